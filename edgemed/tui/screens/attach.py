"""Which file or series: a path with completion, or a tree of folders; a folder's series are chosen in a box of their own.

Answers with a file's path, which nobody has opened yet, or with a series.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.message import Message
from textual.suggester import Suggester
from textual.widgets import DirectoryTree, Input, Static

from edgemed.clinic.imaging import Series
from edgemed.core.text import one_line
from edgemed.tui.i18n import N_, _, localise_bindings
from edgemed.tui.paths import IMAGE_SUFFIXES, complete, parse_pasted
from edgemed.tui.screens.base import Dialog, Working
from edgemed.tui.screens.folder import FolderScreen


class PathSuggester(Suggester):
    """The first file or folder that what is typed begins."""

    def __init__(self, screen: Working) -> None:
        super().__init__(use_cache=False, case_sensitive=True)
        self._screen = screen

    async def get_suggestion(self, value: str) -> str | None:
        return await self._screen.offload(complete, value)


class ImageTree(DirectoryTree):
    """Folders and files that may be images. Names are shown as text, whatever they contain."""

    ICON_NODE = "▸ "
    ICON_NODE_EXPANDED = "▾ "
    ICON_FILE = "  "
    BINDINGS = [Binding("s", "series", N_("Series of this folder"))]

    class FolderWanted(Message):
        """What a folder holds is to be shown."""

        def __init__(self, path: Path) -> None:
            super().__init__()
            self.path = path

    def on_mount(self) -> None:
        localise_bindings(self)

    def action_series(self) -> None:
        """Of the folder under the cursor, or the one that the file under it lies in."""
        node = self.cursor_node
        if node is not None and not node.allow_expand:
            node = node.parent
        if node is not None and node.data is not None:
            self.post_message(self.FolderWanted(node.data.path))

    def filter_paths(self, paths: Iterable[Path]) -> Iterable[Path]:
        return [
            path for path in paths if not path.name.startswith(".") and (path.suffix.lower() in IMAGE_SUFFIXES or self._safe_is_dir(path))
        ]

    def process_label(self, label: str | Text) -> Text:
        return Text(one_line(label if isinstance(label, str) else label.plain), no_wrap=True)


class AttachScreen(Dialog[Path | Series]):
    """Path line and tree."""

    DEFAULT_CSS = """
    AttachScreen > .box { width: 90; height: 90%; }
    AttachScreen DirectoryTree { height: 1fr; background: $surface; }
    """

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self._folder = folder

    def compose_box(self) -> ComposeResult:
        yield Static(_("Attach an image"), classes="title", markup=False)
        yield Static(_("Type a path (→ completes), drop a file or folder here, or choose below. S: a folder's series."), classes="quiet")
        yield Input(placeholder=_("/path/to/image.dcm"), id="path", suggester=PathSuggester(self))
        yield Static("", classes="problem", markup=False)
        with Vertical():
            yield ImageTree(self._folder or Path.home())

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one(Input).focus()

    @on(DirectoryTree.FileSelected)
    def _selected(self, event: DirectoryTree.FileSelected) -> None:
        self.dismiss(event.path)

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        value = event.value.strip()
        if value:
            self.go(self._check(parse_pasted(value) or Path(value).expanduser()))

    @on(ImageTree.FolderWanted)
    def _folder_wanted(self, event: ImageTree.FolderWanted) -> None:
        self.go(self._look_through(event.path))

    async def _look_through(self, folder: Path) -> None:
        wanted = await self.app.push_screen_wait(FolderScreen(folder))
        if wanted is not None:
            self.dismiss(wanted)

    async def _check(self, path: Path) -> None:
        if await self.offload(path.is_file):
            self.dismiss(path)
            return
        if await self.offload(path.is_dir):
            await self._look_through(path)
            return
        problem = self.query_one(".problem", Static)
        problem.update(_("There is no file and no folder at {path}.").format(path=one_line(str(path))))
        problem.add_class("-shown")
