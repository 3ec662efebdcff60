"""File paths as they come from outside: pasted or dropped onto the terminal, typed half, or new in a watched folder.

    parse_pasted("'/media/stick/wrist 1.png'")     # Path("/media/stick/wrist 1.png"); None for text that is no path
    complete("~/im")                                # "~/images/"
    FolderWatch(folder).poll()                      # files that are new and no longer growing

Looks at disks, so all but `parse_pasted` is for worker threads. Opens no file.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

from edgemed.core.errors import InputError
from edgemed.core.files import found_at

# Shown in lists of files; what a file is, is found out by its content.
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif", ".dcm", ".dicom", ".ima", ""})
_STARTS = ("/", "~", "./", "../", "file://", "'/", '"/', "'~", '"~')
_MAX_ENTRIES = 2000


def parse_pasted(text: str) -> Path | None:
    """The path that a pasted or dropped text stands for, or None: a terminal pastes a dropped file's name, quoted or escaped."""
    line = text.strip()
    windows = os.name == "nt" and line.strip("\"'")[1:3] == ":\\"
    if not line or "\n" in line or not (line.startswith(_STARTS) or windows):
        return None
    if line.startswith("file://"):
        return Path(unquote(urlparse(line).path))
    if windows:
        return Path(line.strip("\"'"))
    try:
        words = shlex.split(line)
    except ValueError:
        words = [line]
    # An unquoted name with blanks: some terminals paste it as it is.
    return Path(words[0] if len(words) == 1 else line).expanduser()


def complete(typed: str) -> str | None:
    """The first entry that `typed` begins, with a slash behind a folder; None where there is none."""
    if not typed:
        return None
    folder, _, begun = typed.rpartition("/")
    place = Path(folder + "/").expanduser() if "/" in typed else Path(".")
    for name, is_folder in _entries(place):
        if name.startswith(begun) and name != begun and (begun or not name.startswith(".")):
            return f"{typed.removesuffix(begun)}{name}{'/' if is_folder else ''}"
    return None


def _entries(folder: Path) -> list[tuple[str, bool]]:
    return sorted(_scan(folder))


def _scan(folder: Path) -> Iterator[tuple[str, bool]]:
    try:
        with os.scandir(folder) as entries:
            for _, entry in zip(range(_MAX_ENTRIES), entries, strict=False):
                yield entry.name, entry.is_dir()
    except OSError:
        return  # gone, or not ours to read: nothing to offer


class FolderWatch:
    """New files of one folder. What is there at the first look is not new; a file is offered when two looks find the same size."""

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise InputError(f"Expected a folder to watch at {folder}, found {found_at(folder)}.", "Check --watch.")
        self.folder = folder
        self._known: set[str] | None = None
        self._growing: dict[str, int] = {}

    def poll(self) -> list[Path]:
        """Files that came since the last look. Folders, hidden files and partly written ones are left alone."""
        sizes = dict(self._sizes())
        if self._known is None:
            self._known = set(sizes)
            return []
        fresh = {name: size for name, size in sizes.items() if name not in self._known}
        done = sorted(name for name, size in fresh.items() if size and self._growing.get(name) == size)
        self._growing = fresh
        self._known = (self._known | set(done)) & set(sizes)
        return [self.folder / name for name in done]

    def _sizes(self) -> Iterator[tuple[str, int]]:
        try:
            with os.scandir(self.folder) as entries:
                for entry in entries:
                    if not entry.name.startswith(".") and Path(entry.name).suffix.lower() in IMAGE_SUFFIXES and entry.is_file():
                        yield entry.name, entry.stat().st_size
        except OSError:
            return  # a stick that was pulled out: nothing is new
