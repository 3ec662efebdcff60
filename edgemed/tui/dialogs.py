"""Small boxes: a question answered yes or no, and one line of text."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Button, Input, Static

from edgemed.tui.i18n import _
from edgemed.tui.screens.base import Dialog


class ConfirmDialog(Dialog[bool]):
    """Yes or no; no is what Enter says first, and Escape."""

    def __init__(self, question: str, text: str, yes: str, danger: bool = False) -> None:
        super().__init__()
        self._question, self._text, self._yes, self._danger = question, text, yes, danger

    def compose_box(self) -> ComposeResult:
        yield Static(self._question, classes="title", markup=False)
        yield Static(self._text, classes="text", markup=False)
        with Horizontal(classes="buttons"):
            yield Button(_("Cancel"), id="no")
            yield Button(self._yes, id="yes", variant="error" if self._danger else "primary")

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one("#no").focus()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "yes")


class TextDialog(Dialog[str]):
    """One line of text, not empty."""

    def __init__(self, title: str, text: str, value: str = "", accept: str = "", hint: str = "") -> None:
        super().__init__()
        self._title, self._text, self._value, self._accept, self._hint = title, text, value, accept, hint

    def compose_box(self) -> ComposeResult:
        yield Static(self._title, classes="title", markup=False)
        yield Static(self._text, classes="text", markup=False)
        yield Input(self._value, id="line", placeholder=self._hint, max_length=200)
        with Horizontal(classes="buttons"):
            yield Button(_("Cancel"), id="no")
            yield Button(self._accept or _("Save"), id="yes", variant="primary")

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one(Input).focus()

    @on(Input.Submitted)
    def _submitted(self) -> None:
        self._finish()

    @on(Button.Pressed)
    def _pressed(self, event: Button.Pressed) -> None:
        if event.button.id == "yes":
            self._finish()
        else:
            self.dismiss(None)

    def _finish(self) -> None:
        if text := self.query_one(Input).value.strip():
            self.dismiss(text)
