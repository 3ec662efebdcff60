"""F3: the model, and what fits this machine."""

from __future__ import annotations

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Button, Static

from edgemed.tui.i18n import _
from edgemed.tui.screens.base import Dialog
from edgemed.tui.widgets.model_panel import ModelPanel


class ModelScreen(Dialog[None]):
    """The panel in a box."""

    def compose_box(self) -> ComposeResult:
        yield Static(_("Model"), classes="title", markup=False)
        yield ModelPanel()
        with Horizontal(classes="buttons"):
            yield Button(_("Close"), id="close")

    @on(Button.Pressed, "#close")
    def _close(self) -> None:
        self.dismiss(None)
