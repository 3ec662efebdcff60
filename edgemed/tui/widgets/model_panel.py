"""The model as the first run and F3 show it: what was found, what fits this machine, and a button that makes one."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import Button, ProgressBar, Static

from edgemed.core.errors import EdgemedError
from edgemed.core.manifest import Artifact
from edgemed.core.text import one_line
from edgemed.tui.i18n import _
from edgemed.tui.texts import say_error

if TYPE_CHECKING:
    from edgemed.tui.app import ChatApp


class ModelPanel(Vertical):
    """Finds or makes the model, and begins to load it. `brief`: the first line of what fits."""

    DEFAULT_CSS = """
    ModelPanel { height: auto; }
    ModelPanel #fit { color: $quiet; }
    ModelPanel #make { display: none; margin-top: 1; }
    ModelPanel ProgressBar { display: none; }
    ModelPanel.-missing #make { display: block; }
    ModelPanel.-making ProgressBar { display: block; }
    """

    def __init__(self, brief: bool = False) -> None:
        super().__init__()
        self._brief = brief

    @property
    def chat(self) -> ChatApp:
        """The program."""
        return cast("ChatApp", self.app)

    def compose(self) -> ComposeResult:
        yield Static(_("Looking for a model …"), id="found", markup=False)
        yield Static("", id="fit", markup=False)
        yield ProgressBar(show_eta=False)
        yield Button(_("Convert {name} now").format(name=one_line(self.chat.models.name)), id="make", variant="primary")

    def on_mount(self) -> None:
        self.run_worker(self._find())

    async def _find(self) -> None:
        if self.chat.artifact is None:
            await self.chat.find_model()
        await self._show(self.chat.artifact)

    async def _show(self, artifact: Artifact | None) -> None:
        found, fit = self.query_one("#found", Static), self.query_one("#fit", Static)
        self.set_class(artifact is None, "-missing")
        if artifact is None:
            found.update(_("No model was found on this machine. Converting one takes some seconds to minutes and needs no network."))
            return
        m = artifact.manifest
        found.update(_("Model: {name}, {quant}").format(name=one_line(m.name), quant=one_line(m.llm.quant)))
        try:
            lines = await self.chat.offload(self.chat.models.fit, artifact)
            fit.update("\n".join(one_line(line) for line in (lines[:1] if self._brief else lines)))
        except EdgemedError as error:
            fit.update(say_error(error))

    @on(Button.Pressed, "#make")
    def _make(self, event: Button.Pressed) -> None:
        event.stop()
        event.button.disabled = True
        self.add_class("-making")
        self.run_worker(self._convert(), exclusive=True)

    async def _convert(self) -> None:
        bar = self.query_one(ProgressBar)
        button = self.query_one("#make", Button)

        def progress(done: int, total: int) -> None:  # from the converting thread
            self.call_later(bar.update, total=float(total), progress=float(done))

        try:
            artifact = await self.chat.offload(self.chat.models.make, progress)
        except EdgemedError as error:
            self.query_one("#fit", Static).update(say_error(error))
            return
        finally:
            button.disabled = False
            self.remove_class("-making")
        self.chat.use_model(artifact)
        await self._show(artifact)
