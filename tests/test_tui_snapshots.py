"""How the screens look: stored pictures at 80 × 24 and 120 × 40, dark, light and in high contrast. Look at them before updating them.

Clock, ids, time zone and pixels are always the same, and nothing blinks.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from textual.pilot import Pilot
from textual.widgets import DataTable, Input, TextArea

from edgemed.tui import status
from edgemed.tui.i18n import set_language
from edgemed.tui.models import FakeModels
from edgemed.tui.widgets.strip import ImageStrip
from runtimes.consult import Answering
from runtimes.fake import FakeEngine, Script
from tests.dicom_fixture import ct_series, make_dicom
from tests.tui_fixture import (
    answered,
    ask,
    begin,
    build,
    chat,
    drawn,
    on_screen,
    open_case,
    paste,
    said,
    settle,
    text_of,
    unlock,
    write_calibration,
)

SMALL, LARGE = (80, 24), (120, 40)
QUESTION = "Is there a fracture?"
ANSWERS = ("A fracture of the distal radius is suspected.", "Findings: a line in the radius. Impression: fracture.")
SCRIPT = Script(ANSWERS, tokens_per_s=1e6)
Step = Callable[[Pilot[Any]], Awaitable[None]]


@pytest.fixture(autouse=True)
def steady(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One time zone, one folder name on the screen, figures at once; English again afterwards."""
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setattr(status, "STATS_S", 0.05)
    monkeypatch.chdir(tmp_path)
    time.tzset()
    yield
    set_language("en")
    monkeypatch.undo()
    time.tzset()


def phantom() -> Path:
    """A bone of few grey levels: equal neighbours keep the stored screens small."""
    y, x = np.mgrid[-1:1:12j, -1:1:12j]
    values = np.where(abs(x) < 0.3, 190, 40) + np.where(abs(y - x) < 0.1, 30, 0)
    path = Path("wrist.png").absolute()
    Image.fromarray(values.astype(np.uint8)).convert("RGB").save(path)
    return path


async def still(pilot: Pilot[Any]) -> None:
    """Nothing blinks, nothing is on its way."""
    await settle(pilot, lambda: "MB" in text_of(chat(pilot)), "the engine's figures")
    for line in pilot.app.screen.query(Input):
        line.cursor_blink = False
    for area in pilot.app.screen.query(TextArea):
        area.cursor_blink = False
    pilot.app.clear_notifications()
    await pilot.pause()


async def welcome(pilot: Pilot[Any]) -> None:
    await settle(pilot, on_screen(pilot, "WelcomeScreen"), "the first run")
    await settle(pilot, lambda: "fake" in said(pilot, "#found"), "the model")
    await still(pilot)


async def cases(pilot: Pilot[Any]) -> None:
    await begin(pilot)
    for label in ("left wrist, fall", "chest, cough for 3 weeks", "abdomen"):
        await open_case(pilot, label)
        await pilot.press("escape")
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
    await settle(pilot, lambda: pilot.app.screen.query_one(DataTable).row_count == 3, "the cases")
    await still(pilot)


async def case(pilot: Pilot[Any]) -> None:
    await begin(pilot)
    await open_case(pilot, "left wrist, fall", phantom())
    await ask(pilot, QUESTION)
    await answered(pilot, 1)
    await drawn(pilot)
    bar = pilot.app.screen.query_one(status.StatusBar)
    await settle(pilot, lambda: bar.state.tokens_per_s > 0, "the speed")
    await still(pilot)


async def report(pilot: Pilot[Any]) -> None:
    await case(pilot)
    await pilot.press("ctrl+t")
    await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
    await pilot.press("f5")
    await settle(pilot, lambda: "fake" in said(pilot, "#stand"), "the draft")
    await still(pilot)


async def export(pilot: Pilot[Any]) -> None:
    await report(pilot)
    await pilot.press("f8")
    await settle(pilot, on_screen(pilot, "ExportScreen"), "the box")
    pilot.app.screen.query_one("#folder", Input).value = "/media/stick"
    for line in pilot.app.screen.query(Input):
        line.cursor_blink = False
    await pilot.pause()


async def folder(pilot: Pilot[Any]) -> None:
    """Two series and a plain image; sizes do not depend on the library that wrote the files."""
    study = Path("study").absolute()
    (study / "ct").mkdir(parents=True)
    ct_series(study / "ct", 24)
    (study / "cr").write_bytes(make_dicom(np.full((8, 8), 9, np.uint16), SeriesNumber=2, StudyInstanceUID="1.2.1"))
    phantom().rename(study / "wrist.png")
    await begin(pilot)
    await open_case(pilot, "head, fall")
    paste(pilot, "./study")
    await settle(pilot, lambda: "wrist.png" in text_of(chat(pilot)), "what the folder holds")
    await still(pilot)


async def series(pilot: Pilot[Any]) -> None:
    await folder(pilot)
    await pilot.press("down", "enter")
    await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
    strip = pilot.app.screen.query_one(ImageStrip)
    await settle(pilot, lambda: len(strip.images) == 24, "the series")
    await drawn(pilot)
    await pilot.press("ctrl+g", "right_square_bracket", "ctrl+g")
    await drawn(pilot)
    await settle(pilot, lambda: "13/24" in text_of(chat(pilot)), "the next slice")
    await still(pilot)


def key(name: str, screen: str) -> Step:
    async def press(pilot: Pilot[Any]) -> None:
        await cases(pilot)
        await pilot.press(name)
        await settle(pilot, on_screen(pilot, screen), screen)
        for line in pilot.app.screen.query(Input):
            line.cursor_blink = False
        await pilot.pause()

    return press


async def refused(pilot: Pilot[Any]) -> None:
    await cases(pilot)
    await pilot.press("ctrl+l")
    await settle(pilot, on_screen(pilot, "UnlockScreen"), "the lock")
    await unlock(pilot, "not-the-one")
    await settle(pilot, lambda: "wrong" in said(pilot, "#problem"), "refused")
    await still(pilot)


LOOKS: list[tuple[str, Step, tuple[int, int], str, str]] = [
    ("welcome", welcome, SMALL, "dark", "en"),
    ("unlock", refused, SMALL, "light", "en"),
    ("list", cases, SMALL, "contrast", "en"),
    ("list", cases, LARGE, "light", "en"),
    ("case", case, SMALL, "dark", "en"),
    ("case", case, SMALL, "contrast", "en"),
    ("case", case, LARGE, "light", "en"),
    ("case", case, LARGE, "dark", "fr"),
    ("case", case, LARGE, "dark", "ar"),
    ("report", report, SMALL, "light", "en"),
    ("report", report, LARGE, "contrast", "en"),
    ("folder", folder, SMALL, "dark", "en"),
    ("folder", folder, SMALL, "light", "ar"),
    ("series", series, SMALL, "dark", "en"),
    ("export", export, SMALL, "contrast", "en"),
    ("help", key("f1", "HelpScreen"), SMALL, "dark", "en"),
    ("settings", key("f2", "SettingsScreen"), SMALL, "contrast", "en"),
    ("new", key("n", "TextDialog"), SMALL, "light", "en"),
]


@pytest.mark.parametrize(("name", "step", "size", "theme", "language"), LOOKS, ids=[f"{n}-{s[0]}-{t}-{c}" for n, _, s, t, c in LOOKS])
def test_screen(
    snap_compare: Any, monkeypatch: pytest.MonkeyPatch, name: str, step: Step, size: tuple[int, int], theme: str, language: str
) -> None:
    for widget in (TextArea, Input):  # a picture taken a moment later shows another cursor
        monkeypatch.setattr(widget.cursor_blink, "_default", False)
    app = build(Path(), SCRIPT, theme=theme, language=language)
    app.text_order = "program"
    assert snap_compare(app, run_before=step, terminal_size=size)


class Unsure(FakeModels):
    """A calibrated model that is unsure."""

    def open(self, artifact: Any, note: Callable[[str], None]) -> Answering:
        folder = Path("calibrated")
        folder.mkdir()
        write_calibration(folder, refer_below=0.95)
        return FakeEngine(SCRIPT, type(artifact)(folder, artifact.manifest))


def test_a_case_to_refer(snap_compare: Any) -> None:
    app = build(Path(), models=Unsure())
    assert snap_compare(app, run_before=case, terminal_size=LARGE)


def test_an_answer_that_failed(snap_compare: Any) -> None:
    app = build(Path(), script=Script(SCRIPT.answers, tokens_per_s=1e6, die_after=4))
    assert snap_compare(app, run_before=case, terminal_size=SMALL)
