"""What of a folder can be attached: its DICOM series, and the plain images that lie in it. For worker threads.

    contents = list_folder(path, wanted=lambda looked_at: not stopped)
    contents.series, contents.files

Series are looked for in the folders below, too, as a CD has them; plain images are those of the folder itself, told by their names.
Opens no pixels, knows no screen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgemed.clinic.imaging import Series, list_series
from edgemed.core.files import os_errors

PLAIN_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp", ".gif"})
# More than these are not attached without a question: they take a while, and that much room in the store for good.
MANY_FILES = 200
MANY_BYTES = 512_000_000


@dataclass(frozen=True)
class FolderContents:
    """What can be chosen."""

    series: tuple[Series, ...]
    files: tuple[Path, ...]


def list_folder(folder: Path, wanted: Callable[[int], bool] = lambda looked_at: True) -> FolderContents:
    """The folder's series and plain images. Raises InputError, ResourceError, MissingExtraError."""
    series = tuple(list_series(folder, wanted))
    taken = {path for one in series for path in one.files}
    with os_errors(folder):
        files = sorted(path for path in folder.iterdir() if _is_plain(path) and path not in taken)
    return FolderContents(series, tuple(files))


def _is_plain(path: Path) -> bool:
    return path.suffix.lower() in PLAIN_SUFFIXES and not path.name.startswith(".") and path.is_file()


def is_large(series: Series) -> bool:
    """Whether to ask before it is attached."""
    return len(series.files) > MANY_FILES or series.size_bytes > MANY_BYTES
