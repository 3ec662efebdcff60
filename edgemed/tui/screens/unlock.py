"""The passphrase: at the start, and whenever the program is locked. Shows nothing of any case."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Container, Vertical
from textual.reactive import reactive
from textual.widgets import Button, Footer, Input, Static

from edgemed.core.errors import EdgemedError
from edgemed.core.text import one_line
from edgemed.tui.i18n import _
from edgemed.tui.screens.base import ChatScreen
from edgemed.tui.status import StatusBar
from edgemed.tui.texts import say_error


class UnlockScreen(ChatScreen):
    """Asks for the passphrase. `ready` False: the store is still being locked."""

    DEFAULT_CSS = """
    UnlockScreen #middle { height: 1fr; align: center middle; }
    UnlockScreen #box { width: 60; max-width: 96%; height: auto; border: round $primary; background: $surface; padding: 1 2; }
    UnlockScreen .title { text-style: bold; color: $primary; }
    UnlockScreen .quiet { color: $quiet; margin-bottom: 1; }
    UnlockScreen #problem { color: $error; height: auto; min-height: 2; margin-top: 1; }
    UnlockScreen Button { margin-top: 1; }
    """

    ready = reactive(True)

    def __init__(self, ready: bool = True) -> None:
        super().__init__()
        self.set_reactive(UnlockScreen.ready, ready)

    def compose(self) -> ComposeResult:
        with Container(id="middle"), Vertical(id="box"):
            yield Static(_("edgemed is locked"), classes="title", markup=False)
            yield Static(one_line(str(self.chat.store_path)), classes="quiet", markup=False)
            yield Input(password=True, placeholder=_("Passphrase"), id="passphrase")
            yield Static("", id="problem", markup=False)
            yield Button(_("Unlock"), variant="primary", id="unlock")
        yield StatusBar(markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one(Input).focus()
        self.watch_ready(self.ready)

    def watch_ready(self, ready: bool) -> None:
        if self.is_mounted:
            self.query_one("#unlock", Button).disabled = not ready

    @on(Input.Submitted)
    @on(Button.Pressed)
    def _submitted(self) -> None:
        passphrase = self.query_one(Input).value
        if self.ready and passphrase:
            self.ready = False
            self.query_one("#problem", Static).update(_("Checking …"))
            self.go(self._unlock(passphrase), exclusive=True)

    async def _unlock(self, passphrase: str) -> None:
        try:
            await self.offload(self.chat.unlock_store, passphrase)
        finally:
            self.query_one(Input).value = ""
            self.ready = True
        self.chat.enter()

    def failed(self, error: EdgemedError) -> None:
        self.query_one("#problem", Static).update(say_error(error))
        self.query_one(Input).focus()
