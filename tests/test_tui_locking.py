"""Locking, breaking down and being told to end: what is lost (nothing that was said to be kept) and what stays in sight (nothing)."""

from __future__ import annotations

import gc
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from textual.pilot import Pilot
from textual.widgets import Checkbox, Input, TextArea
from tui_fixture import (
    PASSPHRASE,
    RADIOGRAPH,
    Clock,
    ask,
    attach,
    begin,
    build,
    chat,
    cheap_store,
    messages,
    on_screen,
    open_case,
    settle,
    talk_of,
    text_of,
    told,
    unlock,
)

from edgemed.clinic.imaging import client, picture
from edgemed.clinic.records import CaseImage, Report, View
from edgemed.clinic.store import CaseStore
from edgemed.core.errors import EngineLoadError
from edgemed.tui.app import LOCK_AFTER_S
from edgemed.tui.bidi import visual_line
from edgemed.tui.ending import describe_fault
from edgemed.tui.safe import drawable
from edgemed.tui.screens.export import ExportScreen
from edgemed.tui.viewgrid import ViewGrid
from edgemed.tui.widgets.strip import ImageStrip
from runtimes.fake import Script


def store_of(pilot: Pilot[Any]) -> CaseStore:
    """The store past the guard."""
    return chat(pilot)._store._target  # type: ignore[union-attr,no-any-return]


async def type_report(pilot: Pilot[Any], text: str) -> None:
    await pilot.press("ctrl+t")
    await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
    await settle(pilot, lambda: "No report" in str(pilot.app.screen.query_one("#stand").content), "the report's state")  # type: ignore[attr-defined]
    pilot.app.screen.query_one("#findings", TextArea).text = text


@pytest.fixture
def slow_close(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Saving a report waits until the test says so."""
    gate = threading.Event()
    save = CaseStore.save_report

    def slow(self: CaseStore, report: Any) -> Any:
        assert gate.wait(20)
        return save(self, report)

    monkeypatch.setattr(CaseStore, "save_report", slow)
    return gate


@pytest.mark.parametrize("how", ["idle", "ctrl+l", "ctrl+q"])
async def test_what_locks_again_while_it_locks_loses_nothing(tmp_path: Path, slow_close: threading.Event, how: str) -> None:
    clock = Clock()
    app = build(tmp_path, clock=clock)
    async with app.run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist")
        await type_report(pilot, "a fracture of the radius")
        clock.now_s += LOCK_AFTER_S + 1
        app._lock_if_idle()
        await settle(pilot, on_screen(pilot, "UnlockScreen"), "the lock")
        for _ in range(3):
            app._lock_if_idle() if how == "idle" else await pilot.press(how)
            await pilot.pause(0.02)
        slow_close.set()
        if how == "ctrl+q":
            await settle(pilot, lambda: not app.is_running or not app.unlocked, "the end")
        else:
            await settle(pilot, lambda: not app.unlocked and app.screen.ready, "the lock's end")  # type: ignore[attr-defined]
        if app._store is not None and how == "ctrl+q":
            await settle(pilot, lambda: app.engines.ready is None, "the engine's end")
    with CaseStore.open(tmp_path / "store" / "cases.db", PASSPHRASE, "x") as store:
        report = store.load_report(store.list_cases()[0].id)
        assert report is not None and report.findings == "a fracture of the radius"


async def test_no_toast_outlives_the_lock(tmp_path: Path) -> None:
    async with build(tmp_path).run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist")
        chat(pilot).say("Opening DOE_JOHN.dcm …")
        await settle(pilot, lambda: "DOE_JOHN" in told(pilot), "the toast")
        await pilot.press("ctrl+l")
        await settle(pilot, lambda: on_screen(pilot, "UnlockScreen")() and pilot.app.screen.ready, "the lock")  # type: ignore[attr-defined]
        assert "DOE_JOHN" not in text_of(chat(pilot)) and "DOE_JOHN" not in told(pilot)


async def test_no_pixel_and_no_line_outlives_the_lock(tmp_path: Path) -> None:
    async with build(tmp_path).run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        app = chat(pilot)
        assert app.session is not None
        kept = [weakref.ref(one) for one in app.session._pictures.values()]
        visual_line("يد مكسورة", True)
        assert kept
        await pilot.press("ctrl+l")
        await settle(pilot, lambda: on_screen(pilot, "UnlockScreen")() and pilot.app.screen.ready, "the lock")  # type: ignore[attr-defined]

        def gone() -> bool:
            gc.collect()
            return not any(one() for one in kept)

        await settle(pilot, gone, "the pictures' end")
        assert client._process is None and not picture._cache._frames and not visual_line.cache_info().currsize


async def test_a_lock_while_the_cases_are_being_opened_stays_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_store(tmp_path).lock()
    gate = threading.Event()
    read = CaseStore.get_setting

    def slow(self: CaseStore, name: str, default: str = "") -> str:
        assert gate.wait(20)
        return read(self, name, default)

    monkeypatch.setattr(CaseStore, "get_setting", slow)
    async with build(tmp_path).run_test(size=(100, 30)) as pilot:
        await unlock(pilot)
        await settle(pilot, lambda: chat(pilot).unlocked, "the store")
        await pilot.press("ctrl+l")
        await settle(pilot, lambda: not chat(pilot).unlocked, "the lock")
        gate.set()
        await settle(pilot, lambda: on_screen(pilot, "UnlockScreen")() and pilot.app.screen.ready, "the lock's screen")  # type: ignore[attr-defined]
        await pilot.pause(0.1)
        assert on_screen(pilot, "UnlockScreen")()


async def test_an_engine_that_does_not_come_back_does_not_end_the_program(tmp_path: Path) -> None:
    async with build(tmp_path).run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist")
        app = chat(pilot)
        await settle(pilot, lambda: app.engines.state == "ready", "the engine")

        def fails() -> Any:
            raise EngineLoadError("The model does not load.", "Try again.")

        app.engines.stats = fails  # type: ignore[method-assign]
        for bar in app.screen.query("StatusBar"):
            await bar._take_stats()  # type: ignore[attr-defined]
        assert app.is_running


async def test_a_break_down_says_nothing_of_the_patient_and_saves_what_was_typed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    app = build(tmp_path)
    with pytest.raises(ZeroDivisionError):
        async with app.run_test(size=(100, 30)) as pilot:
            await begin(pilot)
            await open_case(pilot, "wrist")
            await type_report(pilot, "typed and not saved")

            def broken() -> None:
                passphrase = "hunter2-secret"  # noqa: F841, S105 — what a traceback with values would show
                raise ZeroDivisionError("Doe^John")

            app.call_later(broken)
            await pilot.pause(0.2)
    shown = capfd.readouterr().err
    assert app.return_code == 1 and "ZeroDivisionError" in shown and "hunter2" not in shown and "Doe" not in shown
    app.finish()
    with CaseStore.open(tmp_path / "store" / "cases.db", PASSPHRASE, "x") as store:
        report = store.load_report(store.list_cases()[0].id)
        assert report is not None and report.findings == "typed and not saved"


def test_a_fault_is_told_whole_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Doe" not in describe_fault(ValueError("Doe^John"))
    monkeypatch.setenv("EDGEMED_DEBUG", "1")
    assert "Doe" in describe_fault(ValueError("Doe^John"))


async def test_nothing_that_is_pasted_or_completed_steers_the_terminal(tmp_path: Path) -> None:
    from textual import events

    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a\x1b]0;pwn\x07\x9bb.png").write_bytes(RADIOGRAPH.read_bytes())
    async with build(tmp_path).run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist")
        pilot.app.screen.query_one("#question").post_message(events.Paste("hello \x1b[2J\u202e there \udcff"))
        await settle(pilot, lambda: "there ?" in text_of(chat(pilot)), "what was pasted")
        assert "hello [2J there ?" in text_of(chat(pilot))
        await pilot.press("ctrl+o")
        await settle(pilot, on_screen(pilot, "AttachScreen"), "the files")
        line = pilot.app.screen.query_one("#path", Input)
        line.value = f"{folder}/a"
        await settle(pilot, lambda: "pwn" in text_of(chat(pilot)), "the suggestion")
        assert not set(text_of(chat(pilot))) & {"\x1b", "\x07", "\x9b", "\u202e"}


def test_drawable_keeps_the_width() -> None:
    assert drawable("a\x1b[31m\x85\u2066b\udc80") == "a[31mb?"


async def test_a_draft_is_not_typed_over_and_a_third_one_can_be_made(tmp_path: Path) -> None:
    hold = threading.Semaphore(0)
    answers = ("No fracture.", "Findings: none.\nImpression: normal.\nRecommendation: none.")
    async with build(tmp_path, Script(answers, tokens_per_s=1e6, hold=hold)).run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        hold.release(100)
        await ask(pilot, "fracture?")
        await settle(pilot, lambda: len(messages(pilot)) == 2, "the answer")
        store, case_id = store_of(pilot), chat(pilot).session.case_id  # type: ignore[union-attr]
        for _ in range(2):
            newest = store.load_report(case_id)
            store.save_report(Report(case_id, newest.version if newest else 1, findings=f"by hand {newest}"))
            store.sign_report(case_id, "Dr. A")
        await settle(pilot, lambda: not pilot.app.screen._answering, "the end")  # type: ignore[attr-defined]
        while hold.acquire(blocking=False):
            pass
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await settle(pilot, lambda: "by hand" in pilot.app.screen.query_one("#findings", TextArea).text, "its text")
        await pilot.press("f5")
        await settle(pilot, on_screen(pilot, "ConfirmDialog"), "the question")
        pilot.app.screen.query_one("#yes").press()  # type: ignore[attr-defined]
        await settle(pilot, lambda: on_screen(pilot, "ReportScreen")() and pilot.app.screen._drafting, "the drafting")  # type: ignore[attr-defined]
        assert all(area.read_only for area in pilot.app.screen.query(TextArea))
        hold.release(100)
        await settle(pilot, lambda: not pilot.app.screen._drafting, "the draft")  # type: ignore[attr-defined]
        report = store.load_report(case_id)
        assert report is not None and report.version == 3 and report.impression == "normal."
        assert not any(area.read_only for area in pilot.app.screen.query(TextArea))
        assert talk_of(pilot) == ""


async def test_what_is_shown_is_what_is_asked_about(tmp_path: Path) -> None:
    """An image that is turned while others are being opened beside it stays as it was turned."""
    async with build(tmp_path).run_test(size=(120, 40)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        other = tmp_path / "other.png"
        Image.new("RGB", (40, 30), (200, 10, 10)).save(other)
        await attach(pilot, other)
        strip, grid = pilot.app.screen.query_one(ImageStrip), pilot.app.screen.query_one(ViewGrid)
        session, gate = pilot.app.screen.session, threading.Event()  # type: ignore[attr-defined]
        real, begun = session.picture, threading.Event()

        def slow(image: CaseImage) -> Any:
            begun.set()
            assert gate.wait(20)
            return real(image)

        session.picture = slow
        await pilot.press("f4")
        await settle(pilot, begun.is_set, "the opening")
        key = grid.active.key
        grid.active.action_invert()
        await settle(pilot, lambda: strip.find(key).view.invert, "the change")  # type: ignore[union-attr]
        gate.set()
        await settle(pilot, lambda: len(grid.views) == 2 and all(view.picture for view in grid.views), "both images")
        assert {view.key: view.view for view in grid.views} == {image.id: image.view for image in strip.asked}
        strip.fill([replace(image, view=View()) for image in strip.images])
        assert strip.find(key).view.invert  # type: ignore[union-attr]


async def test_consent_is_seen_without_colours(tmp_path: Path) -> None:
    async with build(tmp_path).run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await pilot.app.push_screen(ExportScreen(signed=False))
        await settle(pilot, lambda: "Name the patient" in text_of(chat(pilot)), "the box")
        ticked = [line for line in text_of(chat(pilot)).splitlines() if "▐X▌" in line]
        assert len(ticked) == 2 and not any("Name the patient" in line for line in ticked)
        pilot.app.screen.query_one("#identity", Checkbox).toggle()
        await settle(pilot, lambda: "▐X▌ Name the patient" in text_of(chat(pilot)), "the tick")
