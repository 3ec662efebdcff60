"""What the terminal can draw, found out once before the screens start, and the widget that draws pictures that way.

    graphics = detect_graphics(setting)       # before App.run(): afterwards Textual owns the terminal's answers
    surface = build_surface(graphics)         # a widget; surface.put(surface.encode(image)) shows an image of its own size

    kitty      Kitty's protocol with Unicode placeholders       whole pixels
    sixel      Sixels                                           whole pixels
    halfblock  "▀" in two colours: any terminal with colours    1 × 2 pixels a cell
    unicode    shades of characters: any terminal               1 pixel a cell

"auto" asks the terminal only where an answer comes in time and is not mangled: never through tmux, screen or SSH, where a late or
swallowed answer would appear as typed text. There TERM decides, and without a name that is known, half blocks if the terminal says
that it has 256 colours or more (sixteen have four greys: characters show more). A setting that names one of the four is obeyed. Kitty
and Sixel are textual-image's, the other two cells.py's. Knows nothing of medicine.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from PIL.Image import Image as PILImage
from textual.widget import Widget

from edgemed.core.errors import InputError
from edgemed.tui.cells import CellSurface

Kind = Literal["kitty", "sixel", "halfblock", "unicode"]
KINDS: tuple[Kind, ...] = ("kitty", "sixel", "halfblock", "unicode")
SETTINGS = ("auto", *KINDS)
# What most terminals use, and textual-image assumes (a VT340's cell).
CELL_PX = (10, 20)

# TERM values that name a terminal whose protocol is known, for where it cannot be asked.
_TERMS: dict[str, Kind] = {
    "xterm-kitty": "kitty",
    "xterm-ghostty": "kitty",
    "foot": "sixel",
    "foot-extra": "sixel",
    "mlterm": "sixel",
    "yaft-256color": "sixel",
    "dumb": "unicode",
    "linux": "unicode",
    "ansi": "unicode",
    "vt100": "unicode",
    "vt220": "unicode",
}


@dataclass(frozen=True)
class Graphics:
    """How pictures are drawn, and how many pixels a cell has (which half blocks and characters need for the proportions only)."""

    kind: Kind
    cell_width_px: int = CELL_PX[0]
    cell_height_px: int = CELL_PX[1]

    @property
    def pixels_per_cell(self) -> tuple[int, int]:
        """Columns and rows of pixels that one cell can show."""
        return {"halfblock": (1, 2), "unicode": (1, 1)}.get(self.kind, (self.cell_width_px, self.cell_height_px))

    @property
    def pixel_aspect(self) -> float:
        """A shown pixel's width over its height."""
        across, down = self.pixels_per_cell
        return (self.cell_width_px / across) / (self.cell_height_px / down)


def detect_graphics(
    setting: str = "auto",
    environ: Mapping[str, str] | None = None,
    is_tty: bool | None = None,
    query: Callable[[], Kind | None] | None = None,
) -> Graphics:
    """The best way to draw here, or the one that `setting` names. Raises InputError for an unknown setting."""
    if setting not in SETTINGS:
        raise InputError(f"Expected one of {', '.join(SETTINGS)} for images, found {setting!r}.", "Choose one in the settings.")
    tty = bool(sys.__stdout__ and sys.__stdout__.isatty()) if is_tty is None else is_tty
    if setting == "auto":
        kind = _detect(os.environ if environ is None else environ, tty, query or _query_terminal)
    else:
        kind = cast(Kind, setting)
    return Graphics(kind, *(_cell_size_px() if tty else CELL_PX))


def _detect(environ: Mapping[str, str], tty: bool, query: Callable[[], Kind | None]) -> Kind:
    if not tty:
        return "unicode"
    term = environ.get("TERM", "")
    if environ.get("TMUX") or environ.get("STY") or term.split("-")[0] in ("tmux", "screen"):
        return _cells_for(environ)
    if term in _TERMS:
        return _TERMS[term]
    if environ.get("SSH_CONNECTION") or environ.get("SSH_TTY") or environ.get("MOSH_CONNECTION"):
        return _cells_for(environ)
    return query() or _cells_for(environ)


def _cells_for(environ: Mapping[str, str]) -> Kind:
    # As rich finds out how many colours there are.
    deep = environ.get("COLORTERM", "").lower() in ("truecolor", "24bit") or environ.get("TERM", "").endswith(("256color", "direct"))
    return "halfblock" if deep or sys.platform == "win32" else "unicode"


def _query_terminal() -> Kind | None:
    with _unasked():
        from textual_image.renderable import sixel, tgp
    # textual-image's order: terminals that answer to both draw Sixels right and Kitty's placeholders wrong.
    if sixel.query_terminal_support():
        return "sixel"
    return "kitty" if tgp.query_terminal_support() else None


@contextmanager
def _unasked() -> Iterator[None]:
    """textual-image asks the terminal what it can do while it is imported; what we ask, and when, is decided here."""
    stdout = sys.__stdout__
    sys.__stdout__ = cast("io.TextIOWrapper", io.StringIO())  # type: ignore[misc]
    try:
        yield
    finally:
        sys.__stdout__ = stdout  # type: ignore[misc]


def _cell_size_px() -> tuple[int, int]:
    """What the terminal's driver says about a cell, without asking the terminal; through SSH it often says nothing."""
    if sys.platform == "win32" or not sys.__stdout__:
        return CELL_PX
    import fcntl
    import struct
    import termios

    try:
        answer = fcntl.ioctl(sys.__stdout__.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    except OSError:
        return CELL_PX
    rows, columns, width_px, height_px = struct.unpack("HHHH", answer)
    if not (rows and columns and width_px >= columns and height_px >= rows):
        return CELL_PX
    return width_px // columns, height_px // rows


class Surface(Protocol):
    """A widget that shows pixels. `encode` may run in any thread, `put` (None clears) in the screen's only."""

    def encode(self, image: PILImage) -> Any: ...
    def put(self, encoded: Any) -> None: ...


def build_surface(graphics: Graphics) -> Widget:
    """A widget with Surface's two methods. It draws what it is given: hand it an image of its own size in pixels."""
    if graphics.kind in ("halfblock", "unicode"):
        return CellSurface(blocks=graphics.kind == "halfblock")
    with _unasked():
        from textual_image import _terminal

        from edgemed.tui.pixels import KittySurface, SixelSurface
    # The library would otherwise ask the terminal for this in the middle of the program, and take the answer from the person's keys.
    _terminal.get_cell_size._result = _terminal.CellSize(graphics.cell_width_px, graphics.cell_height_px)  # type: ignore[attr-defined]
    if graphics.kind == "kitty":
        return KittySurface(classes="surface")
    return SixelSurface((graphics.cell_width_px, graphics.cell_height_px), classes="surface")
