"""F1: what every key does."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from edgemed.tui.i18n import N_, _
from edgemed.tui.screens.base import Dialog
from edgemed.tui.texts import purpose

# (section, (keys, what they do)…); translated when shown.
SECTIONS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        N_("Everywhere"),
        (
            ("F1", N_("This help")),
            ("F3", N_("The model, and what fits this machine")),
            ("Ctrl+L", N_("Lock now")),
            ("Ctrl+Q", N_("Quit")),
            ("Tab, Shift+Tab", N_("To the next or previous part of the screen")),
        ),
    ),
    (
        N_("List of cases"),
        (
            ("Enter", N_("Open the case")),
            ("N, R, D", N_("New case, rename, delete")),
            ("/", N_("Search")),
            ("F2", N_("Settings: language, look, auto-lock")),
        ),
    ),
    (
        N_("Case"),
        (
            ("Enter", N_("Send the question")),
            ("Escape", N_("Stop the answer; otherwise back")),
            ("Ctrl+R", N_("Ask the last question again")),
            ("Ctrl+O", N_("Attach an image; or drop a file or a folder onto the terminal")),
            ("Ctrl+N", N_("Attach the new file of the watched folder")),
            ("Ctrl+T", N_("The report")),
            ("Ctrl+G", N_("To the image's keys, and back")),
            ("F4", N_("The marked images side by side, or one alone")),
            ("F6", N_("Image and conversation, image alone, conversation alone")),
            ("Space", N_("In the list of images: ask about this image or not")),
        ),
    ),
    (
        N_("Report"),
        (
            ("F5", N_("Let the model write a draft")),
            ("Ctrl+S", N_("Save")),
            ("F9", N_("Sign; it cannot be changed afterwards")),
            ("F8", N_("Export files for others")),
            ("Escape", N_("Stop the draft; otherwise save and go back")),
        ),
    ),
    (
        N_("Attach"),
        (
            ("Enter", N_("Attach the file; open the folder, or list what a typed folder holds")),
            ("S", N_("In the tree: the DICOM series and images of this folder")),
            ("Escape", N_("Close; a series that is on its way is stopped and not kept")),
        ),
    ),
    (
        N_("Image"),
        (
            ("+ − F", N_("Zoom in, out, whole image")),
            ("← → ↑ ↓", N_("Move")),
            ("Shift+arrows", N_("Window: up and down its centre, left and right its width")),
            ("1–9, 0", N_("Window presets, the file's own window")),
            ("I", N_("Invert")),
            ("[ ]", N_("Previous and next frame; in a series also the previous and next image")),
            ("M", N_("Mask burnt-in text: arrows move, Shift+arrows size, Enter keeps")),
            ("V", N_("The exact pixels that the model sees")),
            ("R", N_("Everything as it was; masks stay")),
        ),
    ),
)
_KEYS_WIDTH = 16


class HelpScreen(Dialog[None]):
    """All keys in a box that scrolls."""

    DEFAULT_CSS = """
    HelpScreen > .box { width: 78; }
    HelpScreen VerticalScroll { height: auto; max-height: 100%; }
    """
    BINDINGS = [("f1", "cancel", ""), ("enter", "cancel", "")]

    def compose_box(self) -> ComposeResult:
        with VerticalScroll():
            yield Static(_help(self.app.theme_variables["primary"]), markup=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one(VerticalScroll).focus()


def _help(colour: str) -> Group:
    parts: list[Text | Table] = [Text(purpose(), style="italic"), Text("")]
    for title, keys in SECTIONS:
        grid = Table.grid(padding=(0, 1))
        grid.add_column(width=_KEYS_WIDTH)
        grid.add_column(ratio=1)
        for key, what in keys:
            grid.add_row(Text(key, style=colour), Text(_(what)))
        parts += [Text(_(title), style=f"bold {colour}"), grid, Text("")]
    return Group(*parts[:-1])
