"""Images and reports on the screen, with real files, the real store and the fake engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Checkbox, Input, OptionList, TextArea

from edgemed.clinic.store import CaseStore
from edgemed.tui.widgets.strip import ImageStrip
from runtimes.fake import Script
from tests.dicom_fixture import make_dicom
from tests.tui_fixture import (
    RADIOGRAPH,
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
    paste,
    said,
    settle,
    text_of,
    told,
)

SIZE = (80, 24)
LONG = " ".join(f"word{n}" for n in range(400))

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
        line.value = ""
        paste(pilot, "72 year old man, fall.\n\n  ALLERGY: iodine.\r\nIs there a fracture?\n")
        whole = "72 year old man, fall. ALLERGY: iodine. Is there a fracture?"
        await settle(pilot, lambda: line.value == whole, "every line of it")
        await pilot.press("escape")  # a question that is not sent yet stays with its case, until the program is locked
        await settle(pilot, on_screen(pilot, "CaseListScreen"), "the list")
        await pilot.press("enter")
        await settle(pilot, on_screen(pilot, "CaseScreen"), "the case")
        assert app.screen.query_one("#question", Input).value == whole
        await pilot.press("ctrl+l")
        await settle(pilot, on_screen(pilot, "UnlockScreen"), "the lock")
        await settle(pilot, lambda: "has not been kept" in told(pilot), "what became of it")
        assert app.drafts == {}


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


async def test_a_report_is_saved_now_and_then_and_the_cursor_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemed.tui.screens.report.AUTOSAVE_S", 0.05)
    app = build(tmp_path)
    async with app.run_test(size=SIZE) as pilot:
        await begin(pilot)
        await open_case(pilot, "chest")
        await pilot.press("ctrl+t")
        await settle(pilot, on_screen(pilot, "ReportScreen"), "the report")
        await pilot.press(*"half a sentence")
        store: CaseStore = app.store._target  # type: ignore[attr-defined]
        case_id = store.list_cases()[0].id
        await settle(pilot, lambda: (r := store.load_report(case_id)) is not None and r.findings == "half a sentence", "what is kept")
        await pilot.press("left", "X")
        assert app.screen.query_one("#findings", TextArea).text == "half a sentencXe"
