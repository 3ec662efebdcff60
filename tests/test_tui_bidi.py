"""Right-to-left text on the screen: order, joining, widths, styles, and who is asked to do it."""

from __future__ import annotations

import unicodedata

import pytest
from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual.app import ComposeResult
from textual.color import Color
from textual.widgets import Static

from edgemed.tui import i18n
from edgemed.tui.bidi import BidiApp, BidiFilter, choose_text_order

BLACK = Color(0, 0, 0)
RED, BLUE = Style(color="red"), Style(color="blue")


def shown(*segments: Segment) -> str:
    return "".join(segment.text for segment in BidiFilter().apply(list(segments), BLACK))


def letters(text: str) -> str:
    """Presentation forms back to the letters that they are forms of."""
    return unicodedata.normalize("NFKC", text)


def test_a_word_is_reversed_and_joined() -> None:
    line = shown(Segment("سلام"))
    assert letters(line) == "مالس"
    assert line == "ﻡﻼﺳ"[:0] + "".join(("\ufee1", "\ufe8e", "\ufee0", "\ufeb3"))  # isolated meem, final alef, medial lam, initial seen


@pytest.mark.parametrize(
    ("logical", "visual"),
    [
        ("plain text", "plain text"),
        ("│ صورة │ حالة │", "│ ةروص │ ةلاح │"),  # panels keep their places
        ("صورة  حالة", "ةروص  ةلاح"),  # and columns
        ("صور: 12", "12 :روص"),
        ("ملف: chest.dcm", "chest.dcm :فلم"),
        ("تاريخ 2026-11-22 10:30", "10:30 2026-11-22 خيرات"),
        ("مركز -600، عرض 1500", "1500 ضرع ،-600 زكرم"),
        ("إطار 2/20", "2/20 راطإ"),
        ("(صورة)", "(ةروص)"),
        ("  صورة   ", "  ةروص   "),
        ("Case: صورة 5", "Case: 5 ةروص"),
    ],
)
def test_lines_stand_in_reading_order(logical: str, visual: str) -> None:
    line = shown(Segment(logical))
    assert letters(line) == visual
    assert cell_len(line) == cell_len(logical)


@pytest.mark.parametrize(
    ("logical", "visual"),
    [
        ("chest.dcm · صورة 5", "5 ةروص · chest.dcm"),
        ("chest، النافذة", "ةذفانلا ،chest"),
        ("مكان: /tmp/a/c.db", "/tmp/a/c.db :ناكم"),
        ("مجلد /tmp/out/ هنا", "انه /tmp/out/ دلجم"),
        ("^q خروج", "جورخ ^q"),
        ("برنامج edgemed.", ".edgemed جمانرب"),
        ("The word is صورة in this answer.", "The word is ةروص in this answer."),
        ("Enter", "Enter"),
    ],
)
def test_in_arabic_a_line_runs_from_the_right_unless_it_is_mostly_latin(logical: str, visual: str) -> None:
    i18n.set_language("ar")
    try:
        assert letters(shown(Segment(logical))) == visual
    finally:
        i18n.set_language("en")


def test_a_line_that_comes_by_twice_stays_as_it_is() -> None:
    once = shown(Segment("│ صورة 5 │"))
    assert shown(Segment(once)) == once


def test_styles_go_with_their_letters() -> None:
    segments = BidiFilter().apply([Segment("│", BLUE), Segment("صورة ", RED), Segment("abc", BLUE)], BLACK)
    assert [(letters(segment.text), segment.style) for segment in segments] == [("│abc", BLUE), (" ةروص", RED)]


def test_marks_stay_on_their_letter() -> None:
    line = shown(Segment("مَرّ"))
    assert letters(line) == "رّمَ"
    assert cell_len(line) == cell_len("مَرّ") == 2


def test_every_arabic_string_keeps_its_width() -> None:
    catalogue = i18n.translator("ar")
    texts = [text for text in catalogue._catalog.values() if text]  # type: ignore[attr-defined]
    assert len(texts) > 100
    for text in texts:
        for line in text.splitlines():
            assert cell_len(shown(Segment(line))) == cell_len(line), line


def test_lines_without_right_to_left_text_are_handed_on_as_they_are() -> None:
    segments = [Segment("Frame 2/20", RED)]
    assert BidiFilter().apply(segments, BLACK) is segments


@pytest.mark.parametrize(
    ("setting", "environ", "order"),
    [
        ("auto", {"TERM": "xterm-256color"}, "program"),
        ("auto", {"VTE_VERSION": "7600"}, "program"),
        ("auto", {"VTE_VERSION": "7600", "TMUX": "x"}, "terminal"),
        ("auto", {"KONSOLE_VERSION": "240800"}, "terminal"),
        ("auto", {"TERM_PROGRAM": "Apple_Terminal"}, "terminal"),
        ("program", {"KONSOLE_VERSION": "240800"}, "program"),
        ("terminal", {}, "terminal"),
    ],
)
def test_who_orders(setting: str, environ: dict[str, str], order: str) -> None:
    assert choose_text_order(setting, environ) == order


class Page(BidiApp[None]):
    def compose(self) -> ComposeResult:
        yield Static("صورة الصدر", markup=False)


@pytest.mark.parametrize(("code", "start"), [("ar", 30), ("en", 0)])
async def test_text_begins_at_the_right_in_a_language_that_does(code: str, start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    i18n.set_language(code)
    app = Page()
    app.text_order = "program"
    written: list[str] = []
    try:
        async with app.run_test(size=(40, 3)) as pilot:
            monkeypatch.setattr(app._driver, "write", written.append)
            i18n.localise_bindings(app)
            await pilot.pause()
            line = app.screen._compositor.render_strips()[0].text
            assert letters(line).strip() == "ردصلا ةروص"
            assert len(line) - len(line.lstrip()) == start
    finally:
        i18n.set_language("en")
    assert "\x1b[8h" in written
