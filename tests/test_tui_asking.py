"""Questions and answers on the screen: streamed, stopped, failed, locked in the middle, resized, hostile; no key lost.

The real store, the fake engine, and a guard that raises where something slow is called on the screen's thread.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

from textual.widgets import Input

from edgemed.core.errors import EngineMemoryError
from edgemed.core.manifest import Artifact
from edgemed.tui.models import FakeModels
from edgemed.tui.widgets.conversation import Conversation
from runtimes.consult import Answering
from runtimes.fake import Script
from tests.tui_fixture import (
    PASSPHRASE,
    RADIOGRAPH,
    CheapStores,
    answered,
    ask,
    attach,
    begin,
    build,
    drawn,
    engine_of,
    messages,
    on_screen,
    open_case,
    settle,
    talk_of,
    text_of,
    told,
    unlock,
)

SIZE = (80, 24)
LONG = " ".join(f"word{n}" for n in range(400))

# -- asking -----------------------------------------------------------------------------------------------------------------


async def test_an_answer_comes_with_its_model_its_sureness_and_the_advice(tmp_path: Path) -> None:
    app = build(tmp_path, Script(("A chest.", "No fracture."), tokens_per_s=1e6))
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        assert "radiograph.jpg" in text_of(app) and "1 image" in text_of(app)
        await ask(pilot, "Shown?")
        await answered(pilot, 1)
        await ask(pilot, "Broken?")
        await answered(pilot, 2)
        text = talk_of(pilot)
        for part in ("Broken?", "No fracture.", "fake · none", "not calibrated", "never replaces a clinician"):
            assert part in text, part
        assert [m.text for m in messages(pilot)] == ["Shown?", "A chest.", "Broken?", "No fracture."]
        assert all(len(m.images) == 1 for m in messages(pilot))
        assert engine_of(pilot).requests[1].images == engine_of(pilot).requests[0].images
    assert app.guard.screen_calls == 0 and app.guard.calls > 20


async def test_no_key_is_dropped_while_tokens_stream(tmp_path: Path) -> None:
    """20 tokens a second for as long as it takes to type: each key arrives, in order, and no slow call was made on the screen's thread."""
    app = build(tmp_path, Script((LONG,), tokens_per_s=20))
    typed = "the_quick_brown_fox_0123456789"
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        await ask(pilot, "Shown?")
        talk = app.screen.query_one(Conversation)
        await settle(pilot, lambda: talk.repaints > 0, "the first words")
        before = engine_of(pilot).stats().total_tokens
        await pilot.press(*typed)
        assert app.screen.query_one("#question", Input).value == typed
        assert app.screen._answering and engine_of(pilot).stats().total_tokens > before, "tokens came while keys were typed"  # type: ignore[attr-defined]
        await pilot.press("escape")
        await answered(pilot, 1)
        assert app.screen.query_one("#question", Input).value == typed
    assert app.guard.screen_calls == 0


async def test_repaints_do_not_follow_tokens(tmp_path: Path) -> None:
    app = build(tmp_path, Script((LONG,), tokens_per_s=1e6))
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist")
        await ask(pilot, "Shown?")
        await answered(pilot, 1)
        assert engine_of(pilot).stats().total_tokens >= 250
        assert app.screen.query_one(Conversation).repaints < 100
        assert "longest length" in talk_of(pilot)


async def test_escape_stops_and_ctrl_r_asks_again(tmp_path: Path) -> None:
    hold = threading.Semaphore(3)
    app = build(tmp_path, Script(("one two three four five six",), tokens_per_s=1e6, hold=hold))
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        await ask(pilot, "Count?")
        await settle(pilot, lambda: "one two three four" in text_of(app), "some words")
        assert "answering" in text_of(app)
        await ask(pilot, "More?")  # not sent: kept where it was typed
        assert app.screen.query_one("#question", Input).value == "More?"
        await pilot.press("escape")
        await answered(pilot, 1)
        assert "Stopped: this answer is not whole." in text_of(app)
        for _ in range(10):
            hold.release()
        await pilot.press("ctrl+r")
        await answered(pilot, 2)
        assert [(m.text, m.state) for m in messages(pilot)[1:]] == [
            ("one two three four", "stopped"),
            ("one two three four five six", "complete"),
        ]


async def test_a_death_in_the_middle_is_told_and_retry_works(tmp_path: Path) -> None:
    app = build(tmp_path, Script(("one two three",), tokens_per_s=1e6, die_after=2))
    async with app.run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        await ask(pilot, "Count?")
        await answered(pilot, 1)
        text = talk_of(pilot)
        assert "one two" in text and "Failed: this answer is not whole." in text and "process ended" in text
        assert "Retry" in text_of(app)
        await pilot.press("ctrl+r")
        await answered(pilot, 2)
        assert [m.state for m in messages(pilot)] == ["complete", "failed", "complete"]
        assert engine_of(pilot).stats().restarts == 1


class BrokenModels(FakeModels):
    """A model that is there and does not load."""

    def open(self, artifact: Artifact, note: Callable[[str], None]) -> Answering:
        raise EngineMemoryError("The model does not fit this machine's memory.", "Use a smaller one.")


async def test_a_question_that_cannot_be_asked_stays_where_it_was_typed(tmp_path: Path) -> None:
    app = build(tmp_path, models=BrokenModels())
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        await ask(pilot, "Shown?")
        line = app.screen.query_one("#question", Input)
        await settle(pilot, lambda: line.value == "Shown?", "the question back")
        assert "could not be loaded" in text_of(app) and messages(pilot) == []
        assert "does not fit" in told(pilot)


async def test_a_terminal_resized_while_streaming(tmp_path: Path) -> None:
    hold = threading.Semaphore(3)
    app = build(tmp_path, Script((LONG,), tokens_per_s=1e6, hold=hold))
    async with app.run_test(size=(120, 40)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        await ask(pilot, "Shown?")
        for size in ((80, 24), (40, 12), (20, 6), (200, 60), (80, 24)):
            for _ in range(5):
                hold.release()
            await pilot.resize_terminal(*size)
            await pilot.pause()
            assert app.screen.size == size
        await drawn(pilot)
        for _ in range(500):
            hold.release()
        await answered(pilot, 1)
        assert messages(pilot)[1].text.startswith("word0 word1") and app.guard.screen_calls == 0


async def test_locking_in_the_middle_of_an_answer_records_what_came(tmp_path: Path) -> None:
    hold = threading.Semaphore(3)
    app = build(tmp_path, Script((LONG,), tokens_per_s=1e6, hold=hold))
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist")
        await ask(pilot, "Shown?")
        await settle(pilot, lambda: "word3" in text_of(app), "some words")
        await pilot.press("ctrl+l")
        await settle(pilot, lambda: not app.unlocked, "the lock")
        assert "word" not in text_of(app)
        await unlock(pilot)
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        assert [(m.text, m.state) for m in messages(pilot)] == [("Shown?", "complete"), ("word0 word1 word2 word3", "stopped")]


# -- text from outside ------------------------------------------------------------------------------------------------------

EVIL = "x\x1b[2J\x1b]0;owned\x07[red]y[/red]\u202e\x9b31m"


async def test_text_from_outside_cannot_steer_the_terminal(tmp_path: Path) -> None:
    image = tmp_path / "a\x1b[31m[bold]b.jpg"
    image.write_bytes(RADIOGRAPH.read_bytes())
    store = CheapStores.create(tmp_path / "store" / "cases.db", PASSPHRASE, "tester")
    store.create_case(EVIL)
    store.lock()
    app = build(tmp_path, Script((EVIL,), tokens_per_s=1e6))
    seen: list[str] = []
    async with app.run_test(size=(120, 40)) as pilot:
        await unlock(pilot)
        await settle(pilot, lambda: "[red]" in text_of(app), "the case")
        seen.append(text_of(app))
        await pilot.press("enter")
        await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
        await attach(pilot, image)
        await ask(pilot, "?")
        await answered(pilot, 1)
        seen.append(text_of(app))
        assert "[bold]b.jpg" in seen[-1] and seen[-1].count("[red]y[/red]") >= 2
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await pilot.press("f5")
        await settle(pilot, lambda: "[red]" in text_of(app), "the draft")
        seen.append(text_of(app))
    for text in seen:
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
