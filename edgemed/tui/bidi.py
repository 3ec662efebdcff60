"""Arabic on a terminal: letters joined, lines in reading order, nothing else on the screen moved.

    class ChatApp(BidiApp[None]): ...          # that is all; `text_order` forces a choice, see TEXT_ORDERS
    localise_bindings(app)                     # (i18n.py) also gives the app the class -rtl: text then begins at the right

What was decided, and why:

- Strings stay in logical order everywhere: catalogues, store, reports, Textual's wrapping. Only finished lines of cells are reordered,
  after wrapping and cutting, by a Textual line filter. So widths never change, and wrapping cuts where a reader would.
- Most terminals do no bidirectional layout. Those that do (GNOME's and other VTE terminals, mintty) take a whole row for one paragraph
  and would swap panels, borders and columns that stand side by side. They are told to leave order to the program
  (ECMA-48 BDSM, `CSI 8 l`; put back at the end), and lines are laid out here: the same on every terminal.
- Terminals that reorder and cannot be told not to (Konsole, Apple's Terminal, mlterm; any of these around tmux, which passes the request
  on to none) get logical order. A wrong guess over SSH is what the setting is for.
- Between borders, and between columns (two spaces or more), each piece of a line is a paragraph of its own, ordered by Unicode's
  algorithm (python-bidi). Its direction is that of its first letter; but in a language that runs right to left a piece with such letters
  runs that way too, even if wrapping or a file name put a Latin word first, unless it is Latin for the most part (an English answer
  that quotes a word). Letters become presentation forms (arabic-reshaper), one for one: lam-alef is two
  joined cells and no ligature, so that a line's width stays what Textual measured.
- No isolates or other direction marks are written: core.text takes them out of what comes from outside, as names could be disguised with
  them, and terminals draw them as boxes. Instead translations keep a placeholder whose text is foreign (a name, a path) after a colon or
  at the end, where neither order can turn the sentence round.

Text copied off the screen with the mouse is in the order of the screen.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from rich.cells import get_character_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.app import App
from textual.color import Color
from textual.filter import LineFilter

from edgemed.core.errors import MissingExtraError
from edgemed.tui.i18n import language

if TYPE_CHECKING:
    from arabic_reshaper import ArabicReshaper

TextOrder = Literal["program", "terminal"]
TEXT_ORDERS = ("auto", "program", "terminal")

# Hebrew, Arabic, Syriac and their supplements and presentation forms.
_RIGHT_TO_LEFT = re.compile("[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff\U0001e800-\U0001efff]")
# What is shaped already was put in order already: the screen under a dialog comes by twice.
_SHAPED = re.compile("[\ufb50-\ufdff\ufe70-\ufefc]")
# Where one paragraph ends and the next begins: frames, blocks and scroll bars, and the gap between columns.
_BREAKS = re.compile("([\u2500-\u259f]+|  +)")
# ECMA-48's bidirectional support mode: explicit (the program orders) and implicit (the terminal does).
EXPLICIT_MODE, IMPLICIT_MODE = "\x1b[8l", "\x1b[8h"

# A signed number, a date, a time, a fraction: one number to the algorithm, which would turn 2026-11-22 round after an Arabic word and
# put a minus behind its number (Unicode's HL3 leaves this to the program).
_NUMBER = re.compile("[-+−]?[0-9]+(?:[-/:.,][0-9]+)*")
# Of a path, a key's name or a domain the signs before and after belong to it: without this /tmp would end in a slash.
_LATIN = re.compile(r"(?<!\S)[~^/\\.@#+-]*[A-Za-z][^\s\u0590-\u08ff]*[/\\*](?!\S)|(?<!\S)[~^/\\.@#+-]+(?=[A-Za-z])")

Cell = tuple[str, Style | None]
ReturnType = TypeVar("ReturnType")


def choose_text_order(setting: str = "auto", environ: Mapping[str, str] | None = None) -> TextOrder:
    """Who puts right-to-left text in reading order here: this program, or the terminal."""
    if setting == "program":
        return "program"
    if setting == "terminal":
        return "terminal"
    env = os.environ if environ is None else environ
    stubborn = "KONSOLE_VERSION" in env or "MLTERM" in env or env.get("TERM_PROGRAM") == "Apple_Terminal"
    deaf = bool(env.get("TMUX") or env.get("STY")) and "VTE_VERSION" in env
    return "terminal" if stubborn or deaf else "program"


def direction(text: str, right_to_left: bool) -> Literal["L", "R"]:
    """Which way a piece of a line runs, in a language that runs right to left or not."""
    kinds = [unicodedata.bidirectional(char) for char in text]
    backward, forward = sum(kind in ("R", "AL") for kind in kinds), kinds.count("L")
    if right_to_left:
        return "R" if 2 * backward >= forward else "L"
    first = next((kind for kind in kinds if kind in ("L", "R", "AL")), "L")
    return "L" if first == "L" else "R"


def visual_order(text: str, base: Literal["L", "R"]) -> list[tuple[str, int]]:
    """The characters of one paragraph as they stand from left to right, shaped, each with its index in `text`."""
    try:
        from bidi import algorithm
    except ImportError as error:
        raise MissingExtraError.of("Arabic text", "clinic") from error
    storage: dict[str, Any] = algorithm.get_empty_storage()
    storage["base_level"], storage["base_dir"] = int(base == "R"), base
    algorithm.get_embedding_levels(text, storage)
    for index, (char, shaped) in enumerate(zip(storage["chars"], _shaped(text), strict=True)):
        char["at"], char["ch"] = index, shaped
    for number in _NUMBER.finditer(text):
        for at in range(*number.span()):
            storage["chars"][at]["type"] = "EN"
    for latin in _LATIN.finditer(text):
        for at in range(*latin.span()):
            storage["chars"][at]["type"] = "L"
    algorithm.explicit_embed_and_overrides(storage)
    algorithm.resolve_weak_types(storage, False)
    algorithm.resolve_neutral_types(storage, False)
    algorithm.resolve_implicit_levels(storage, False)
    algorithm.reorder_resolved_levels(storage, False)
    algorithm.apply_mirroring(storage, False)
    return [(char["ch"], char["at"]) for char in storage["chars"]]


def _shaped(text: str) -> str:
    shaped = str(_reshaper().reshape(text))
    return shaped if len(shaped) == len(text) else text


@lru_cache(maxsize=1)
def _reshaper() -> ArabicReshaper:
    from arabic_reshaper import ArabicReshaper

    return ArabicReshaper({"support_ligatures": False, "delete_harakat": False, "delete_tatweel": False, "shift_harakat_position": False})


@lru_cache(maxsize=4096)
def visual_line(text: str, right_to_left: bool = False) -> tuple[tuple[str, int], ...]:
    """A whole line of the screen: `visual_order` of each piece between borders and columns, marks behind the letter they stand on."""
    placed: list[tuple[str, int]] = []
    start = 0
    for piece in _BREAKS.split(text):
        inner = piece.strip(" ")
        lead = len(piece) - len(piece.lstrip(" ")) if inner else len(piece)
        if _RIGHT_TO_LEFT.search(inner) and not _SHAPED.search(inner):
            placed += [(" ", start + at) for at in range(lead)]
            placed += _marks_last([(char, start + lead + at) for char, at in visual_order(inner, direction(inner, right_to_left))])
            placed += [(" ", start + at) for at in range(lead + len(inner), len(piece))]
        else:
            placed += [(char, start + at) for at, char in enumerate(piece)]
        start += len(piece)
    return tuple(placed)


def forget_lines() -> None:
    """Let go of the lines that were laid out, for locking."""
    visual_line.cache_clear()


def _marks_last(placed: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """A cell is a letter and then its marks, but reversing a run puts marks before their letter."""
    ordered: list[tuple[str, int]] = []
    marks: list[tuple[str, int]] = []
    for char, at in placed:
        if not get_character_cell_size(char) and not (ordered and ordered[-1][1] == at - 1):
            marks.insert(0, (char, at))
        else:
            ordered += [(char, at), *marks]
            marks = []
    return ordered + marks


class BidiFilter(LineFilter):
    """Reorders the finished lines of widgets that hold right-to-left text; all others pass untouched."""

    def apply(self, segments: list[Segment], background: Color) -> list[Segment]:
        text = "".join(segment.text for segment in segments)
        if not _RIGHT_TO_LEFT.search(text) or any(segment.control for segment in segments):
            return segments
        styles = [segment.style for segment in segments for _char in segment.text]
        return _joined([(char, styles[at]) for char, at in visual_line(text, language().right_to_left)])


def _joined(cells: Sequence[Cell]) -> list[Segment]:
    """Neighbours of one style as one segment."""
    segments: list[Segment] = []
    start = 0
    for end in range(1, len(cells) + 1):
        if end == len(cells) or cells[end][1] != cells[start][1]:
            segments.append(Segment("".join(char for char, _style in cells[start:end]), cells[start][1]))
            start = end
    return segments


class BidiApp(App[ReturnType], Generic[ReturnType]):
    """An app whose right-to-left text is put in order as decided above."""

    DEFAULT_CSS = """
    .-rtl Static, .-rtl Label, .-rtl Checkbox, .-rtl RadioButton { text-align: right; }
    """

    text_order: str = "auto"
    _bidi = BidiFilter()

    def get_line_filters(self) -> Sequence[LineFilter]:
        filters = super().get_line_filters()
        return [*filters, self._bidi] if choose_text_order(self.text_order) == "program" else filters

    def on_mount(self) -> None:
        if self._driver is not None and choose_text_order(self.text_order) == "program":
            self._driver.write(EXPLICIT_MODE)

    def on_unmount(self) -> None:
        if self._driver is not None and choose_text_order(self.text_order) == "program":
            self._driver.write(IMPLICIT_MODE)
