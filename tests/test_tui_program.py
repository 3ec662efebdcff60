"""The terminal program under a person's hands: the real store, the fake engine, and no slow call on the screen's thread.

Every app here has a strict guard: a call of the store, the engine or an image on the screen's thread ends the test.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.color import Color
from textual.pilot import Pilot
from textual.widgets import Checkbox, DataTable, Input, OptionList, Select, TextArea

from edgemed.clinic.store import CaseStore
from edgemed.core.errors import EngineMemoryError, HubError
from edgemed.core.manifest import Artifact
from edgemed.tui.models import FakeModels, Progress
from edgemed.tui.screens.help import SECTIONS
from edgemed.tui.widgets.conversation import Conversation
from edgemed.tui.widgets.strip import ImageStrip
from runtimes.consult import Answering
from runtimes.fake import FakeEngine, Script, fake_artifact
from tests.dicom_fixture import make_dicom
from tests.tui_fixture import (
    PASSPHRASE,
    RADIOGRAPH,
    CheapStores,
    Clock,
    answered,
    ask,
    attach,
    begin,
    build,
    chat,
    create_store,
    drawn,
    on_screen,
    open_case,
    paste,
    said,
    settle,
    talk_of,
    text_of,
    told,
    unlock,
)

SIZE = (80, 24)
LONG = " ".join(f"word{n}" for n in range(400))


def engine_of(pilot: Pilot[Any]) -> FakeEngine:
    engine = chat(pilot).engines.ready
    assert engine is not None
    return engine._target  # type: ignore[attr-defined,no-any-return]


def messages(pilot: Pilot[Any]) -> list[Any]:
    """What the store holds of the first case, read past the guard."""
    store: CaseStore = chat(pilot).store._target  # type: ignore[attr-defined]
    return store.list_messages(store.list_cases()[0].id)


# -- the first run, and passphrases -----------------------------------------------------------------------------------------


async def test_the_first_run_makes_a_store_that_opens_again(tmp_path: Path) -> None:
    app = build(tmp_path)
    async with app.run_test(size=SIZE) as pilot:
        await settle(pilot, on_screen(pilot, "WelcomeScreen"), "the first run")
        await settle(pilot, lambda: "fake" in said(pilot, "#found"), "the model")
        assert "never replaces a clinician" in text_of(app)
        await pilot.press(*"short", "enter", *"short", "enter")
        await settle(pilot, lambda: "8" in said(pilot, "#problem"), "too short")
        app.screen.query_one("#first", Input).value = app.screen.query_one("#second", Input).value = ""
        await pilot.press(*PASSPHRASE, "enter", *"something-else", "enter")
        await settle(pilot, lambda: "differ" in said(pilot, "#problem"), "two passphrases")
        await pilot.press(*PASSPHRASE, "enter")
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        assert "No cases yet" in text_of(app)
        await pilot.press("ctrl+q")
        await settle(pilot, lambda: not app.is_running or app._exit, "the end")
    assert app.guard.screen_calls == 0 and app.guard.calls > 0
    CheapStores.open(app.store_path, PASSPHRASE, "tester").lock()


async def test_a_wrong_passphrase_is_told_and_tries_are_limited(tmp_path: Path) -> None:
    CheapStores.create(tmp_path / "store" / "cases.db", PASSPHRASE, "tester").lock()
    app = build(tmp_path)
    async with app.run_test(size=SIZE) as pilot:
        await unlock(pilot, "not-the-one")
        await settle(pilot, lambda: "wrong" in said(pilot, "#problem").lower(), "refused")
        for _ in range(20):
            await unlock(pilot, "not-the-one")
            await settle(pilot, lambda: bool(app.screen.ready), "an answer")  # type: ignore[attr-defined]
            if re.search(r"\d+ s", said(pilot, "#problem")):
                break
        assert re.search(r"\d+ s", said(pilot, "#problem")), said(pilot, "#problem")
        assert app.screen.query_one(Input).value == "" and not app.unlocked


async def test_locking_hides_all_and_keeps_what_was_typed_into_a_report(tmp_path: Path) -> None:
    app = build(tmp_path)
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await pilot.press(*"broken")
        await pilot.press("ctrl+l")
        await settle(pilot, on_screen(pilot, "UnlockScreen"), "the lock")
        assert len(app.screen_stack) == 2 and "wrist" not in text_of(app)
        await settle(pilot, lambda: not app.unlocked, "a locked store")
        await unlock(pilot)
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        await settle(pilot, lambda: app.screen.query_one(DataTable).row_count == 1, "the case")
        await pilot.press("enter")
        await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await settle(pilot, lambda: app.screen.query_one("#findings", TextArea).text == "broken", "the text")


async def test_an_idle_program_locks_itself(tmp_path: Path) -> None:
    clock = Clock()
    app = build(tmp_path, clock=clock)
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        clock.now_s += 299
        app._lock_if_idle()
        await pilot.press("down")  # somebody is there
        clock.now_s += 299
        app._lock_if_idle()
        await pilot.pause()
        assert app.unlocked
        clock.now_s += 1
        app._lock_if_idle()
        await settle(pilot, lambda: on_screen(pilot, "UnlockScreen")() and not app.unlocked, "the lock")


# -- cases ------------------------------------------------------------------------------------------------------------------


async def test_cases_are_made_found_renamed_and_deleted(tmp_path: Path) -> None:
    app = build(tmp_path)
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        for label in ("wrist", "chest"):
            await open_case(pilot, label)
            await pilot.press("escape")
            await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        table = app.screen.query_one(DataTable)
        await settle(pilot, lambda: table.row_count == 2, "two cases")
        assert str(table.get_row_at(0)[0]) == "chest"
        await pilot.press("slash", *"wri")
        await settle(pilot, lambda: table.row_count == 1, "the search")
        await pilot.press("enter", "r")
        await settle(pilot, on_screen(pilot, "TextDialog"), "rename")
        await pilot.press("end", *"_2", "enter")
        await settle(pilot, lambda: table.row_count == 1 and str(table.get_row_at(0)[0]) == "wrist_2", "the new label")
        await pilot.press("d")
        await settle(pilot, on_screen(pilot, "ConfirmDialog"), "a question")
        await pilot.press("enter")  # no is what Enter says first
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        assert table.row_count == 1
        await pilot.press("d")
        await settle(pilot, on_screen(pilot, "ConfirmDialog"), "a question")
        await pilot.press("tab", "enter")
        await settle(pilot, lambda: table.row_count == 0, "nothing")
        assert "No case matches" in text_of(app)


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
    """50 tokens a second for as long as it takes to type: each key arrives, in order, and no slow call was made on the screen's thread."""
    app = build(tmp_path, Script((LONG,), tokens_per_s=50))
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


# -- images -----------------------------------------------------------------------------------------------------------------


async def test_pasted_text_that_is_no_file_stays_text(tmp_path: Path) -> None:
    app = build(tmp_path)
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist")
        line = app.screen.query_one("#question", Input)
        for text in ("a plain question", "/no/such/file.png"):
            line.value = ""
            paste(pilot, text)
            await settle(pilot, lambda text=text: line.value == text, text)  # type: ignore[misc]


async def test_the_attach_box_completes_and_refuses(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "wrist.jpg").write_bytes(RADIOGRAPH.read_bytes())
    app = build(tmp_path)
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist")
        await pilot.press("ctrl+o")
        await settle(pilot, on_screen(pilot, "AttachScreen"), "the box")
        line = app.screen.query_one("#path", Input)
        line.value = f"{tmp_path}/images/none"
        await pilot.press("enter")
        await settle(pilot, lambda: "There is no file" in said(pilot, ".problem"), "refused")
        line.value = f"{tmp_path}/images/w"
        line.cursor_position = len(line.value)
        await settle(pilot, lambda: line._suggestion.endswith("wrist.jpg"), "a suggestion")
        await pilot.press("right", "enter")
        await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
        await settle(pilot, lambda: len(app.screen.query_one(ImageStrip).images) == 1, "the image")


async def test_a_watched_folder_offers_its_new_files(tmp_path: Path) -> None:
    folder = tmp_path / "inbox"
    folder.mkdir()
    app = build(tmp_path, watch=folder)
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist")
        screen: Any = app.screen
        await settle(pilot, lambda: hasattr(screen, "_folder"), "the watch")
        (folder / "new[b].jpg").write_bytes(RADIOGRAPH.read_bytes())
        for _ in range(3):
            await screen._look_for_files()
        await settle(pilot, lambda: "New file: new[b].jpg" in text_of(app), "the offer")
        await pilot.press("ctrl+n")
        await settle(pilot, lambda: len(screen.query_one(ImageStrip).images) == 1, "the image")
        assert "New file" not in text_of(app)


async def test_a_dicom_file_fills_in_the_patient_and_another_is_noticed(tmp_path: Path) -> None:
    first, second = tmp_path / "a.dcm", tmp_path / "b.dcm"
    first.write_bytes(make_dicom())
    second.write_bytes(make_dicom(PatientID="another", PatientName="Some^Body"))
    app = build(tmp_path)
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "chest")
        paste(pilot, str(first))
        await settle(pilot, lambda: bool(app.screen.query(ImageStrip)) and len(app.screen.query_one(ImageStrip).images) == 1, "an image")
        await drawn(pilot)
        assert "Qwyzzel" not in text_of(app)
        store: CaseStore = app.store._target  # type: ignore[attr-defined]
        assert "Qwyzzel" in store.load_identity(store.list_cases()[0].id).name
        paste(pilot, str(second))
        await settle(pilot, on_screen(pilot, "ConfirmDialog"), "the warning")
        assert "Another patient?" in text_of(app) and "Some" not in text_of(app)


async def test_burnt_in_text_is_warned_about_and_masked(tmp_path: Path) -> None:
    path = tmp_path / "us.dcm"
    path.write_bytes(make_dicom(modality="US", BurnedInAnnotation="YES"))
    app = build(tmp_path)
    async with app.run_test(size=(120, 40)) as pilot:
        await begin(pilot)
        await open_case(pilot, "belly")
        case: Any = app.screen
        paste(pilot, str(path))
        await settle(pilot, on_screen(pilot, "ConfirmDialog"), "the warning")
        assert "Look at this image first" in text_of(app)
        await pilot.press("tab", "enter")
        await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
        await drawn(pilot)
        await settle(pilot, lambda: "Masking" in text_of(app), "the mask tool")
        await pilot.press("enter", "escape")
        await settle(pilot, lambda: len(case.query_one(ImageStrip).images[0].view.masks) == 1, "the mask")
        await pilot.press("escape")  # back to the question
        await ask(pilot, "Shown?")
        await answered(pilot, 1)
        assert len(messages(pilot)[0].images[0].view.masks) == 1


async def test_questions_are_about_the_marked_images(tmp_path: Path) -> None:
    app = build(tmp_path, Script(("Yes.",), tokens_per_s=1e6))
    second = tmp_path / "b.png"
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 10, 10)).save(second)
    async with app.run_test(size=(120, 40)) as pilot:
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        await attach(pilot, second)
        strip = app.screen.query_one(ImageStrip)
        assert [image.name for image in strip.asked] == ["radiograph.jpg", "b.png"]
        await pilot.press("f4")
        await drawn(pilot)
        assert sum(view.display for view in app.screen.query("ImageView")) == 2
        strip.focus()
        await pilot.press("space")
        await settle(pilot, lambda: [image.name for image in strip.asked] == ["radiograph.jpg"], "one marked")
        await pilot.press("escape")
        await ask(pilot, "Shown?")
        await answered(pilot, 1)
        assert len(engine_of(pilot).requests[0].images) == 1
        assert isinstance(strip, OptionList)


async def test_a_window_chosen_by_hand_is_kept_and_goes_with_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "ct.dcm"
    path.write_bytes(make_dicom(modality="CT"))
    app = build(tmp_path, Script(("Yes.",), tokens_per_s=1e6))
    async with app.run_test(size=(120, 40)) as pilot:
        await begin(pilot)
        await open_case(pilot, "head", path)
        await pilot.press("ctrl+g", "i", "shift+up", "ctrl+g")
        strip = app.screen.query_one(ImageStrip)
        await settle(pilot, lambda: strip.images[0].view.invert and strip.images[0].view.window is not None, "the view")
        view = strip.images[0].view
        await ask(pilot, "Shown?")
        await answered(pilot, 1)
        assert messages(pilot)[1].images[0].view == view
        store: CaseStore = app.store._target  # type: ignore[attr-defined]
        assert store.list_images(store.list_cases()[0].id)[0].view == view


# -- the report -------------------------------------------------------------------------------------------------------------


async def test_a_report_is_drafted_edited_signed_and_exported(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    image = tmp_path / "a.dcm"
    image.write_bytes(make_dicom())
    app = build(tmp_path, Script(("A chest.", "Findings: clear lungs. Impression: normal."), tokens_per_s=1e6))
    async with app.run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await open_case(pilot, "chest", image)
        await ask(pilot, "Shown?")
        await answered(pilot, 1)
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await pilot.press("f5")
        await settle(pilot, lambda: "drafted by fake" in said(pilot, "#stand"), "the draft")
        findings = app.screen.query_one("#findings", TextArea)
        assert findings.text
        await pilot.press("ctrl+home", *"SEEN")
        await pilot.press("f9")
        await settle(pilot, on_screen(pilot, "TextDialog"), "the name")
        await pilot.press(*"Dr_Roe", "enter")
        await settle(pilot, lambda: "signed by Dr_Roe" in said(pilot, "#stand"), "the signature")
        assert findings.read_only and findings.text.startswith("SEEN")
        await pilot.press("f8")
        await settle(pilot, on_screen(pilot, "ExportScreen"), "the box")
        assert not app.screen.query_one("#identity", Checkbox).value
        app.screen.query_one("#folder", Input).value = str(tmp_path / "none")
        await pilot.press("enter")
        await settle(pilot, lambda: "There is no folder" in said(pilot, ".problem"), "refused")
        app.screen.query_one("#folder", Input).value = str(out)
        for kind in ("fhir", "dicom", "sr"):
            app.screen.query_one(f"#{kind}", Checkbox).value = True
        await pilot.press("enter")
        await settle(pilot, lambda: len(list(out.iterdir())) == 5, "the files")
        store: CaseStore = app.store._target  # type: ignore[attr-defined]
        await settle(pilot, lambda: any(entry.action == "export" for entry in store.audit.entries()), "the log")
        assert "SEEN" in next(out.glob("*.md")).read_text(encoding="utf-8")
        assert not any(b"Qwyzzel" in path.read_bytes() for path in out.iterdir())
        store.audit.verify()
    assert app.guard.screen_calls == 0


async def test_a_signed_report_begins_a_new_version(tmp_path: Path) -> None:
    app = build(tmp_path, Script(("Text.",), tokens_per_s=1e6))
    async with app.run_test(size=(100, 30)) as pilot:
        await begin(pilot)
        await open_case(pilot, "chest")
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await pilot.press(*"clear", "f9")
        await settle(pilot, on_screen(pilot, "TextDialog"), "the name")
        await pilot.press(*"Roe", "enter")
        await settle(pilot, lambda: "Version 1, signed by Roe" in said(pilot, "#stand"), "the signature")
        findings = app.screen.query_one("#findings", TextArea)
        assert findings.read_only
        await pilot.press("ctrl+s")
        await settle(pilot, lambda: "Draft 2, not saved yet" in said(pilot, "#stand"), "a new version")
        await pilot.press(*"un", "ctrl+s")
        await settle(pilot, lambda: "Draft 2, written by hand" in said(pilot, "#stand"), "the new version")
        assert not findings.read_only and "un" in findings.text


async def test_leaving_a_report_saves_what_was_typed(tmp_path: Path) -> None:
    app = build(tmp_path)
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "chest")
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await pilot.press(*"typed", "escape")
        await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
        store: CaseStore = app.store._target  # type: ignore[attr-defined]
        report = store.load_report(store.list_cases()[0].id)
        assert report is not None and (report.findings, report.edited) == ("typed", True)


# -- settings, help, model --------------------------------------------------------------------------------------------------


async def test_settings_are_kept_in_the_store(tmp_path: Path) -> None:
    app = build(tmp_path, language="")
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await pilot.press("f2")
        await settle(pilot, on_screen(pilot, "SettingsScreen"), "settings")
        app.screen.query_one("#language", Select).value = "fr"
        app.screen.query_one("#theme", Select).value = "contrast"
        app.screen.query_one("#minutes", Input).value = "0"
        await pilot.click("#save")
        await settle(pilot, lambda: "1" in said(pilot, ".problem"), "refused")
        app.screen.query_one("#minutes", Input).value = "12"
        await pilot.click("#save")
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        assert app.theme == "edgemed-contrast" and app.lock_after_s == 720
        await pilot.press("ctrl+q")
        await settle(pilot, lambda: app._exit, "the end")
    app = build(tmp_path, language="")
    async with app.run_test(size=SIZE) as pilot:
        await unlock(pilot)
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        assert app.theme == "edgemed-contrast" and app.lock_after_s == 720
        from edgemed.tui.i18n import language

        assert language().code == "fr"


async def test_help_names_every_key_and_closes(tmp_path: Path) -> None:
    app = build(tmp_path)
    async with app.run_test(size=(120, 70)) as pilot:
        await begin(pilot)
        await pilot.press("f1")
        await settle(pilot, on_screen(pilot, "HelpScreen"), "help")
        text = " ".join(text_of(app).replace("│", " ").split())
        assert all(what in text for _, keys in SECTIONS for _, what in keys)
        await pilot.press("escape")
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")


async def test_a_missing_model_is_made_on_the_first_run(tmp_path: Path) -> None:
    app = build(tmp_path, models=FakeModels(missing=True))
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot, on_screen(pilot, "WelcomeScreen"), "the first run")
        await settle(pilot, lambda: "No model was found" in said(pilot, "#found"), "no model")
        await pilot.click("#make")
        await settle(pilot, lambda: "Model: fake" in said(pilot, "#found"), "the model")
        await settle(pilot, lambda: app.engines.state == "ready", "the engine")


class NothingPulled(FakeModels):
    """A model that cannot be made, since its source was never pulled."""

    def __init__(self) -> None:
        super().__init__(missing=True)

    def make(self, progress: Progress) -> Artifact:
        raise HubError("Expected the source of edgemed-demo, found none.", "Run: edgemed models pull edgemed-demo")


async def test_a_model_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    app = build(tmp_path, models=NothingPulled())
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot, on_screen(pilot, "WelcomeScreen"), "the first run")
        await settle(pilot, lambda: "No model" in said(pilot, "#found"), "no model")
        create_store(pilot)
        await settle(pilot, on_screen(pilot, "ModelScreen"), "the model's box")
        await settle(pilot, lambda: bool(app.screen.query("#make")) and app.screen.query_one("#make").display, "the button")
        await pilot.click("#make")
        await settle(pilot, lambda: "edgemed models pull edgemed-demo" in said(pilot, "#fit"), "why")


def test_the_fake_models_artifact_is_the_fakes() -> None:
    assert FakeModels().find() == fake_artifact()


# -- high contrast ----------------------------------------------------------------------------------------------------------


def contrast(first: Color, second: Color) -> float:
    """WCAG's ratio of two colours."""

    def luminance(colour: Color) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour.rgb)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def faint_texts(app: Any, least: float) -> set[str]:
    """Letters and digits on the screen that stand out by less."""
    found = set()
    for strip in app.screen._compositor.render_strips():
        for segment in strip:
            style = segment.style
            if style is None or style.color is None or style.bgcolor is None or not re.search(r"\w", segment.text):
                continue
            if style.color.triplet is None or style.bgcolor.triplet is None:
                continue
            ratio = contrast(Color(*style.color.triplet), Color(*style.bgcolor.triplet))
            if ratio < least:
                found.add(f"{segment.text.strip()} {ratio:.1f}")
    return found


@pytest.mark.parametrize(("theme", "least"), [("contrast", 7.0), ("dark", 4.5), ("light", 4.5)])
async def test_every_text_stands_out(tmp_path: Path, theme: str, least: float) -> None:
    app = build(tmp_path, Script(("A chest.",), tokens_per_s=1e6), theme=theme)
    found: dict[str, set[str]] = {}
    async with app.run_test(size=(100, 40)) as pilot:
        await settle(pilot, on_screen(pilot, "WelcomeScreen"), "the first run")
        await settle(pilot, lambda: "fake" in said(pilot, "#found"), "the model")
        found["welcome"] = faint_texts(app, least)
        await begin(pilot)
        await open_case(pilot, "wrist", RADIOGRAPH)
        await ask(pilot, "Shown?")
        await answered(pilot, 1)
        found["case"] = faint_texts(app, least)
        app.screen.query_one(ImageStrip).focus()
        await pilot.pause()
        found["strip"] = faint_texts(app, least)
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await pilot.press("f5")
        await settle(pilot, lambda: "drafted" in said(pilot, "#stand"), "the draft")
        found["report"] = faint_texts(app, least)
        if theme == "contrast":  # what lies under a box is dimmed in the other looks
            await pilot.press("f8")
            await settle(pilot, on_screen(pilot, "ExportScreen"), "the box")
            found["export"] = faint_texts(app, least)
            await pilot.press("escape", "f1")
            await settle(pilot, on_screen(pilot, "HelpScreen"), "help")
            found["help"] = faint_texts(app, least)
            await pilot.press("escape")
        await pilot.press("escape", "escape", "escape")
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        await settle(pilot, lambda: app.screen.query_one(DataTable).row_count == 1, "the case")
        found["list"] = faint_texts(app, least)
        await pilot.press("ctrl+l")
        await settle(pilot, on_screen(pilot, "UnlockScreen"), "the lock")
        found["unlock"] = faint_texts(app, least)
    assert not any(found.values()), found
