"""The terminal program for tests: a real encrypted store with a cheap key, a clock and ids that never change, and the fake engine.

app = build(tmp_path, Script(...))
async with app.run_test(size=(80, 24)) as pilot:
    await begin(pilot)                       # first run: passphrase, then the list of cases
    await open_case(pilot, "wrist", RADIOGRAPH)
    await settle(pilot, lambda: ..., "what is waited for")
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from textual import events
from textual.pilot import Pilot
from textual.widgets import Button, Input, Static

from edgemed.clinic.store import CaseStore, KdfCost, Means
from edgemed.core.calibration import CALIBRATION_NAME
from edgemed.tui.app import ChatApp, ChatOptions, build_app
from edgemed.tui.guard import CallGuard
from edgemed.tui.models import FakeModels, Models
from edgemed.tui.terminal import Graphics
from runtimes.fake import FakeEngine, Script

RADIOGRAPH = Path(__file__).resolve().parents[1] / "edgemed/demo/radiograph.jpg"
PASSPHRASE = "correct-horse"
START = datetime(2026, 3, 2, 8, 30, tzinfo=timezone.utc)
_ROUNDS = 400


def fixed_means() -> Means:
    ticks, ids = itertools.count(), itertools.count(1)
    return Means(
        now=lambda: START + timedelta(minutes=next(ticks)),
        new_id=lambda: f"{next(ids):032x}",
        cost=KdfCost(memory_kib=64, passes=1, lanes=1),
    )


def cheap_store(folder: Path) -> CaseStore:
    return CaseStore.create(folder / "store" / "cases.db", PASSPHRASE, "tester", fixed_means())


class CheapStores:
    """Stands for the class CaseStore."""

    @staticmethod
    def create(path: Path, passphrase: str, actor: str) -> CaseStore:
        return CaseStore.create(path, passphrase, actor, fixed_means())

    @staticmethod
    def open(path: Path, passphrase: str, actor: str) -> CaseStore:
        return CaseStore.open(path, passphrase, actor, fixed_means())


class Clock:
    """Moves when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def build(folder: Path, script: Script | None = None, models: Models | None = None, clock: Clock | None = None, **options: Any) -> ChatApp:
    app = build_app(
        models or FakeModels(script or Script(tokens_per_s=1e6)),
        folder / "store" / "cases.db",
        "tester",
        ChatOptions(**({"language": "en"} | options)),
        stores=CheapStores,  # type: ignore[arg-type]
        guard=CallGuard(strict=True),
        clock=clock or Clock(),
        graphics=Graphics("halfblock"),
    )
    app.animation_level = "none"
    return app


def chat(pilot: Pilot[Any]) -> ChatApp:
    assert isinstance(pilot.app, ChatApp)
    return pilot.app


async def settle(pilot: Pilot[Any], until: Callable[[], bool], what: str) -> None:
    """Let the program run until something is so; a bound on rounds, so that a fault ends a test."""
    for _ in range(_ROUNDS):
        if until():
            await pilot.pause()
            return
        await pilot.pause(0.01)
    raise AssertionError(f"waited in vain: {what}\n{text_of(chat(pilot))}")


def on_screen(pilot: Pilot[Any], name: str) -> Callable[[], bool]:
    return lambda: type(pilot.app.screen).__name__ == name


async def begin(pilot: Pilot[Any]) -> None:
    """From the first run's screen to the list of cases."""
    await settle(pilot, on_screen(pilot, "WelcomeScreen"), "the first run")
    create_store(pilot)
    await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list of cases")


def create_store(pilot: Pilot[Any]) -> None:
    """The passphrase twice, and the button."""
    for name in ("#first", "#second"):
        pilot.app.screen.query_one(name, Input).value = PASSPHRASE
    pilot.app.screen.query_one("#create", Button).press()


async def unlock(pilot: Pilot[Any], passphrase: str = PASSPHRASE) -> None:
    await settle(pilot, lambda: on_screen(pilot, "UnlockScreen")() and pilot.app.screen.ready, "the lock")  # type: ignore[attr-defined]
    pilot.app.screen.query_one(Input).value = passphrase
    await pilot.press("enter")


async def open_case(pilot: Pilot[Any], label: str, image: Path | None = None) -> None:
    """A new case, with an image if one is given."""
    await pilot.press("n")
    await settle(pilot, on_screen(pilot, "TextDialog"), "the label's box")
    pilot.app.screen.query_one("#line", Input).value = label
    await pilot.press("enter")
    await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
    await settle(pilot, lambda: bool(said(pilot, "#heading")), "the case's heading")
    if image is not None:
        await attach(pilot, image)


async def attach(pilot: Pilot[Any], image: Path) -> None:
    """Drop a file onto the terminal."""
    from edgemed.tui.widgets.strip import ImageStrip

    before = len(pilot.app.screen.query_one(ImageStrip).images)
    paste(pilot, str(image))
    strip = pilot.app.screen.query_one(ImageStrip)
    await settle(pilot, lambda: len(strip.images) > before, "the image in the list")
    await drawn(pilot)


async def drawn(pilot: Pilot[Any]) -> None:
    """Until images are drawn."""
    from edgemed.tui.viewer import ImageView

    await settle(pilot, lambda: all(view.picture is not None for view in pilot.app.screen.query(ImageView) if view.display), "a picture")
    await settle(pilot, lambda: not any(view.busy for view in pilot.app.query(ImageView)), "a drawing")


def paste(pilot: Pilot[Any], text: str) -> None:
    pilot.app.screen.query_one("#question").post_message(events.Paste(text))


async def ask(pilot: Pilot[Any], question: str) -> None:
    """Type a question and send it; does not wait for the answer."""
    pilot.app.screen.query_one("#question", Input).value = question
    pilot.app.screen.query_one("#question").focus()
    await pilot.press("enter")


async def answered(pilot: Pilot[Any], count: int) -> None:
    """Until so many answers are there and none is coming."""
    screen = pilot.app.screen
    await settle(pilot, lambda: len(screen.query(".-assistant")) == count and not screen._answering, f"{count} answers")  # type: ignore[attr-defined]


def said(pilot: Pilot[Any], selector: str) -> str:
    return str(pilot.app.screen.query_one(selector, Static).content)


def text_of(app: ChatApp) -> str:
    """Every character on the screen."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def talk_of(pilot: Pilot[Any]) -> str:
    """All of the conversation, in sight or not."""
    return "\n".join(str(entry.content) for entry in pilot.app.screen.query("Entry").results(Static))


def told(pilot: Pilot[Any]) -> str:
    """What is said in the corner."""
    return "\n".join(note.message for note in pilot.app._notifications)


def write_calibration(folder: Path, refer_below: float) -> None:
    data = {"calibrated_on": "slake test", "refer_below": refer_below, "points": [[0.0, 0.0], [0.9, 0.8]]}
    (folder / CALIBRATION_NAME).write_text(json.dumps(data))


def engine_of(pilot: Pilot[Any]) -> FakeEngine:
    engine = chat(pilot).engines.ready
    assert engine is not None
    return engine._target  # type: ignore[attr-defined,no-any-return]


def messages(pilot: Pilot[Any]) -> list[Any]:
    """What the store holds of the first case, read past the guard."""
    store: CaseStore = chat(pilot).store._target  # type: ignore[attr-defined]
    return store.list_messages(store.list_cases()[0].id)
