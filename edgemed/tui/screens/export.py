"""What to export, where to, and whether the patient may be named in it: not, unless ticked."""

from __future__ import annotations

from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.content import Content
from textual.widgets import Button, Checkbox, Input, Static

from edgemed.core.text import one_line
from edgemed.tui.i18n import N_, _
from edgemed.tui.reporting import ExportWish
from edgemed.tui.screens.attach import PathSuggester
from edgemed.tui.screens.base import Dialog

# What each kind is for; translated when shown.
KINDS = {
    "pdf": N_("PDF, for reading and printing"),
    "md": N_("Markdown, plain text"),
    "fhir": N_("FHIR R4, for record systems"),
    "dicom": N_("DICOM, the PDF inside"),
    "sr": N_("DICOM structured report"),
}


class Tick(Checkbox):
    """A box whose X is there or is not. Textual draws it always, unticked in the ground's colour: consent must not hang on colours."""

    def render(self) -> Content:
        self.BUTTON_INNER = "X" if self.value else " "
        return super().render()


class ExportScreen(Dialog[ExportWish]):
    """Folder, kinds, consent."""

    DEFAULT_CSS = """
    ExportScreen Checkbox { border: none; padding: 0; background: $surface; height: 1; width: 1fr; }
    ExportScreen #identity { margin-top: 1; }
    """

    def __init__(self, signed: bool) -> None:
        super().__init__()
        self._signed = signed

    def compose_box(self) -> ComposeResult:
        yield Static(_("Export the report"), classes="title", markup=False)
        if not self._signed:
            yield Static(_("It is not signed: every page will say DRAFT."), classes="text", markup=False)
        yield Input(str(Path.home()), placeholder=_("Folder"), id="folder", suggester=PathSuggester(self))
        for kind, text in KINDS.items():
            yield Tick(_(text), value=kind in ("pdf", "md"), id=kind)
        yield Tick(_("Name the patient in it (the patient has agreed)"), value=False, id="identity")
        yield Static("", classes="problem", markup=False)
        with Horizontal(classes="buttons"):
            yield Button(_("Cancel"), id="cancel")
            yield Button(_("Export"), id="export", variant="primary")

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one("#folder").focus()

    @on(Button.Pressed, "#cancel")
    def _cancel(self) -> None:
        self.dismiss(None)

    @on(Input.Submitted)
    @on(Button.Pressed, "#export")
    def _export(self) -> None:
        kinds = tuple(kind for kind in KINDS if self.query_one(f"#{kind}", Checkbox).value)
        folder = self.query_one("#folder", Input).value.strip()
        if not kinds or not folder:
            self._complain(_("Choose a folder and at least one kind."))
            return
        self.go(self._check(ExportWish(Path(folder).expanduser(), kinds, self.query_one("#identity", Checkbox).value)))

    async def _check(self, wish: ExportWish) -> None:
        if await self.offload(wish.folder.is_dir):
            self.dismiss(wish)
        else:
            self._complain(_("There is no folder {path}.").format(path=one_line(str(wish.folder))))

    def _complain(self, text: str) -> None:
        problem = self.query_one(".problem", Static)
        problem.update(text)
        problem.add_class("-shown")
