"""The first run: a model is found or made, and a store is made with a passphrase typed twice."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Container, VerticalScroll
from textual.widgets import Button, Footer, Input, Static

from edgemed.clinic.store.layout import Layout
from edgemed.core.errors import EdgemedError
from edgemed.core.text import one_line
from edgemed.tui.i18n import _
from edgemed.tui.screens.base import ChatScreen
from edgemed.tui.status import StatusBar
from edgemed.tui.texts import purpose, say_error
from edgemed.tui.widgets.model_panel import ModelPanel


class WelcomeScreen(ChatScreen):
    """Model and passphrase."""

    DEFAULT_CSS = """
    WelcomeScreen #middle { height: 1fr; align: center middle; }
    WelcomeScreen #box { width: 76; max-width: 100%; height: auto; max-height: 100%; padding: 0 2;
        border: round $primary; background: $surface; }
    WelcomeScreen .title { text-style: bold; color: $primary; }
    WelcomeScreen .section { text-style: bold; margin-top: 1; }
    WelcomeScreen .quiet { color: $quiet; }
    WelcomeScreen #problem, WelcomeScreen #earlier { color: $error; height: auto; }
    WelcomeScreen #earlier { display: none; }
    """

    def compose(self) -> ComposeResult:
        with Container(id="middle"), VerticalScroll(id="box", can_focus=False):
            yield Static(_("Welcome to edgemed"), classes="title", markup=False)
            yield Static(purpose(), classes="quiet", markup=False)
            yield Static(_("1. The model"), classes="section", markup=False)
            yield ModelPanel(brief=True)
            yield Static(_("2. The case store"), classes="section", markup=False)
            yield Static(
                _("Nobody can read your cases without the passphrase, and it cannot be recovered. They are kept in: {path}").format(
                    path=one_line(str(self.chat.store_path))
                ),
                classes="quiet",
                markup=False,
            )
            yield Static("", id="earlier", markup=False)
            yield Input(password=True, placeholder=_("Passphrase, at least 8 characters"), id="first")
            yield Input(password=True, placeholder=_("The same passphrase again"), id="second")
            yield Static("", id="problem", markup=False)
            yield Button(_("Create the store"), variant="primary", id="create")
        yield StatusBar(markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one("#first").focus()
        self.go(self._look_for_earlier(), group="earlier")

    async def _look_for_earlier(self) -> None:
        if await self.offload(Layout(self.chat.store_path).key.exists):
            earlier = self.query_one("#earlier", Static)
            earlier.update(_("The key of an earlier store lies there without its cases. If they were moved, quit and put them back first."))
            earlier.display = True

    @on(Input.Submitted, "#first")
    def _next(self) -> None:
        self.query_one("#second").focus()

    @on(Input.Submitted, "#second")
    @on(Button.Pressed, "#create")
    def _create(self) -> None:
        first, second = self.query_one("#first", Input).value, self.query_one("#second", Input).value
        if first != second:
            self.query_one("#problem", Static).update(_("The two passphrases differ. Type them again."))
            self.query_one("#second", Input).value = ""
            return
        self.query_one("#problem", Static).update(_("Making the store …"))
        self.go(self._make(first), exclusive=True)

    async def _make(self, passphrase: str) -> None:
        await self.offload(self.chat.create_store, passphrase)
        self.chat.enter()

    def failed(self, error: EdgemedError) -> None:
        self.query_one("#problem", Static).update(say_error(error))
        self.query_one("#first").focus()
