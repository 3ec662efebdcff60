"""A folder's series and images to choose from, and the box that shows how far the attaching of a series is.

    wanted = await app.push_screen_wait(FolderScreen(folder))             # Series, Path or None
    attached = await app.push_screen_wait(AttachingScreen(case_id, wanted))

Both work in a thread that is told to stop when the box is closed, by Escape or by a lock.
"""

from __future__ import annotations

import threading
from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.content import Content
from textual.widgets import OptionList, ProgressBar, Static
from textual.widgets.option_list import Option

from edgemed.clinic.imaging import Series
from edgemed.core.errors import EdgemedError
from edgemed.core.text import one_line
from edgemed.tui.attaching import Attached, attach_series
from edgemed.tui.dialogs import ConfirmDialog
from edgemed.tui.folders import is_large, list_folder
from edgemed.tui.i18n import _, ngettext
from edgemed.tui.screens.base import Dialog
from edgemed.tui.texts import say_count, say_error, say_series, say_size

Wanted = Path | Series
# The screen is told of every so many files that were looked at.
_TOLD_EVERY = 25


class FolderScreen(Dialog[Path | Series]):
    """What a folder holds; Enter chooses."""

    DEFAULT_CSS = """
    FolderScreen > .box { width: 100; }
    FolderScreen OptionList { height: auto; max-height: 14; border: none; padding: 0; background: $surface;
        text-wrap: nowrap; text-overflow: ellipsis; }
    FolderScreen OptionList:focus { border: none; background-tint: $foreground 0%; }
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._choices: list[Wanted] = []
        self._stopped = threading.Event()

    def compose_box(self) -> ComposeResult:
        yield Static(_("Images in {folder}").format(folder=one_line(str(self._folder))), classes="title", markup=False)
        yield Static(_("Enter attaches. Descriptions are the files' own words and may hold the patient's name."), classes="quiet")
        yield Static(_("Looking through the folder …"), id="stand", markup=False)
        yield Static("", classes="problem", markup=False)
        yield OptionList(markup=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one(OptionList).display = False
        self.go(self._look())

    def on_unmount(self) -> None:
        self._stopped.set()

    def failed(self, error: EdgemedError) -> None:
        """In the box: there is nothing to choose."""
        self.query_one("#stand").display = False
        problem = self.query_one(".problem", Static)
        problem.update(say_error(error))
        problem.add_class("-shown")

    def _wanted(self, looked_at: int) -> bool:
        """In the thread that looks."""
        if looked_at and looked_at % _TOLD_EVERY == 0:
            self.call_later(self._tell, looked_at)
        return not self._stopped.is_set()

    def _tell(self, looked_at: int) -> None:
        if not self._choices:
            text = ngettext("Looked at {count} file …", "Looked at {count} files …", looked_at)
            self.query_one("#stand", Static).update(text.format(count=looked_at))

    async def _look(self) -> None:
        contents = await self.offload(list_folder, self._folder, self._wanted)
        self._choices = [*contents.series, *contents.files]
        stand, choices = self.query_one("#stand", Static), self.query_one(OptionList)
        if not self._choices:
            stand.update(_("There is no DICOM series and no image in this folder."))
            return
        stand.display, choices.display = False, True
        choices.add_options(Option(Content(say_series(one) if isinstance(one, Series) else one_line(one.name))) for one in self._choices)
        choices.highlighted = 0
        choices.focus()

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.go(self._take(self._choices[event.option_index]), group="take", exclusive=True)

    async def _take(self, wanted: Wanted) -> None:
        if isinstance(wanted, Series) and is_large(wanted) and not await self.app.push_screen_wait(_ask_first(wanted)):
            return
        # A series of one file is an image like any other.
        self.dismiss(wanted.files[0] if isinstance(wanted, Series) and len(wanted.files) == 1 else wanted)


def _ask_first(series: Series) -> ConfirmDialog:
    title = _("Attach {count}, {size}?").format(count=say_count(series), size=say_size(series.size_bytes))
    return ConfirmDialog(title, _("This takes a while, and that much room in the case store."), _("Attach"))


class AttachingScreen(Dialog[Attached]):
    """A series on its way into the case; Escape stops it, and nothing of it is kept."""

    DEFAULT_CSS = """
    AttachingScreen ProgressBar { width: 1fr; margin: 1 0; }
    AttachingScreen Bar { width: 1fr; }
    """

    def __init__(self, case_id: str, series: Series) -> None:
        super().__init__()
        self._case_id, self._series = case_id, series
        self._stopped = threading.Event()

    def compose_box(self) -> ComposeResult:
        title = _("Attaching {count}, {size}").format(count=say_count(self._series), size=say_size(self._series.size_bytes))
        yield Static(title, classes="title", markup=False)
        yield ProgressBar(show_eta=False)
        yield Static(_("Escape stops; nothing of it is kept then."), classes="quiet")

    def on_mount(self) -> None:
        super().on_mount()
        self.go(self._attach_series())

    def on_unmount(self) -> None:
        self._stopped.set()

    def action_cancel(self) -> None:
        """Stop; the box goes when the thread has ended."""
        self._stopped.set()

    def failed(self, error: EdgemedError) -> None:
        """Said where the box was."""
        self.chat.tell(error)
        self.dismiss(None)

    async def _attach_series(self) -> None:
        bar = self.query_one(ProgressBar)

        def step(done: int, total: int) -> bool:  # in the attaching thread
            self.call_later(bar.update, total=float(total), progress=float(done))
            return not self._stopped.is_set()

        self.dismiss(await self.offload(attach_series, self.chat.store, self._case_id, self._series, step))
