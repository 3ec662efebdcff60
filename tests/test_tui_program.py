"""The terminal program under a person's hands: first run, passphrases, cases, settings, help and the model.

Every app in these tests has a strict guard: a call of the store, the engine or an image on the screen's thread ends the test.
"""

from __future__ import annotations

import re
from pathlib import Path

from textual.widgets import Button, DataTable, Input, Select, TextArea

from edgemed.core.errors import HubError
from edgemed.core.manifest import Artifact
from edgemed.tui.models import FakeModels, Progress
from edgemed.tui.screens.help import SECTIONS
from runtimes.fake import fake_artifact
from tests.tui_fixture import (
    PASSPHRASE,
    RADIOGRAPH,
    CheapStores,
    Clock,
    begin,
    build,
    create_store,
    on_screen,
    open_case,
    said,
    settle,
    text_of,
    unlock,
)

SIZE = (80, 24)
LONG = " ".join(f"word{n}" for n in range(400))

# -- the first run, and passphrases -----------------------------------------------------------------------------------------


async def test_a_key_without_its_store_is_told_at_the_first_run(tmp_path: Path) -> None:
    app = build(tmp_path)
    app.store_path.parent.mkdir(parents=True, exist_ok=True)
    app.store_path.with_name("cases.db.key").write_text("sealed")
    async with app.run_test(size=SIZE) as pilot:
        await settle(pilot, lambda: "earlier store" in text_of(app), "that there was one")


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
        app.screen.query_one("#save", Button).press()
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
