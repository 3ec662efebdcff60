"""F2 in the list of cases: language, look, how images are drawn, and how soon the program locks itself."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Button, Input, Select, Static

from edgemed.tui.i18n import LANGUAGES, _, language
from edgemed.tui.screens.base import Dialog
from edgemed.tui.terminal import SETTINGS
from edgemed.tui.themes import THEMES

MOST_MINUTES = 120


class SettingsScreen(Dialog[bool]):
    """True where something was changed. Kept in the store, so that they belong to its user and not to the machine."""

    DEFAULT_CSS = """
    SettingsScreen .row { height: 3; }
    SettingsScreen .row > Static { width: 22; padding: 1 0; }
    SettingsScreen .row > Select, SettingsScreen .row > Input { width: 1fr; }
    """

    def compose_box(self) -> ComposeResult:
        yield Static(_("Settings"), classes="title", markup=False)
        with Horizontal(classes="row"):
            yield Static(_("Language"), markup=False)
            yield Select([(item.name, item.code) for item in LANGUAGES.values()], value=language().code, allow_blank=False, id="language")
        with Horizontal(classes="row"):
            yield Static(_("Look"), markup=False)
            now = self.app.theme.removeprefix("edgemed-")
            yield Select([(_(name), key) for key, name in THEMES.items()], value=now, allow_blank=False, id="theme")
        with Horizontal(classes="row"):
            yield Static(_("Images drawn with"), markup=False)
            yield Select([(name, name) for name in SETTINGS], value=self.chat.graphics_setting, allow_blank=False, id="graphics")
        with Horizontal(classes="row"):
            yield Static(_("Lock after (minutes)"), markup=False)
            yield Input(str(max(self.chat.lock_after_s // 60, 1)), type="integer", id="minutes", max_length=3)
        yield Static("", classes="problem", markup=False)
        with Horizontal(classes="buttons"):
            yield Button(_("Cancel"), id="cancel")
            yield Button(_("Save"), id="save", variant="primary")

    @on(Button.Pressed, "#cancel")
    def _cancel(self) -> None:
        self.dismiss(None)

    @on(Button.Pressed, "#save")
    @on(Input.Submitted)
    def _save(self) -> None:
        minutes = self.query_one("#minutes", Input).value
        if not (minutes.isdecimal() and 1 <= int(minutes) <= MOST_MINUTES):
            problem = self.query_one(".problem", Static)
            problem.update(_("Minutes are a number from 1 to {most}.").format(most=MOST_MINUTES))
            problem.add_class("-shown")
            return
        values = {name: str(self.query_one(f"#{name}", Select).value) for name in ("language", "theme", "graphics")}
        self.go(self._keep(values | {"lock_after_s": str(int(minutes) * 60)}))

    async def _keep(self, values: dict[str, str]) -> None:
        for key, value in values.items():
            await self.offload(self.chat.store.set_setting, key, value)
        await self.chat.take_settings(chosen=True)
        self.dismiss(True)
