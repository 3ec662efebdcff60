"""A folder's files that appear together: made in a hidden folder inside it, then moved when all are complete.

    with staged(out_dir) as staging:
        ...write files and manifest.json into staging...
        commit(staging, out_dir)

A conversion that is killed leaves `.convert.*.part` (removed by the next one) or, in the instant of moving, `.convert.commit`
(finished by the next one, or by `recover` when the folder is read); whatever was in the folder before stays until then. Inside and
not beside, because the folder may be a mount of its own. Knows manifest.json's name and that it lists files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgemed.core.errors import InputError, ResourceError
from edgemed.core.files import PART_SUFFIX, found_at, os_errors, sync_dir
from edgemed.core.manifest import MANIFEST_NAME

PREFIX = ".convert."
COMMIT_NAME = f"{PREFIX}commit"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A locked, empty folder to build in. Removed at the end, with `folder` too if that was made here and stays empty.

    Raises InputError where `folder` is a file, ResourceError where another conversion is writing into it.
    """
    with os_errors(folder):
        if os.path.lexists(folder) and not folder.is_dir():
            raise InputError(f"Expected a folder to write into at {folder}, found {found_at(folder)}.", "Choose another folder with --out.")
        made = [p for p in (folder, *folder.parents) if not p.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        finish_commit(folder)
        remove_leftovers(folder)
        staging = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=PART_SUFFIX, dir=folder))
    lock = _lock(staging)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)
        for path in made:
            with suppress(OSError):  # not empty: the conversion succeeded
                path.rmdir()


def remove_leftovers(folder: Path) -> None:
    """Remove what killed conversions left in `folder`."""
    for path in folder.glob(f"{PREFIX}*{PART_SUFFIX}"):
        lock = _lock(path)
        if lock is None and os.name == "posix":
            raise ResourceError(f"Another conversion is writing into {folder}.", "Wait for it, or choose another folder with --out.")
        shutil.rmtree(path, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """A descriptor that holds a lock until it is closed (a killed process closes it too), None where it is taken or no such locks exist."""
    if os.name != "posix":
        return None
    import fcntl  # posix only

    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return None
    return fd


def commit(staging: Path, folder: Path) -> None:
    """Move the staged files into `folder`, replacing an artifact that was there. Complete even if interrupted, see finish_commit."""
    with os_errors(folder):
        sync_dir(staging)
        staging.rename(folder / COMMIT_NAME)
        sync_dir(folder)
        finish_commit(folder)


def finish_commit(folder: Path) -> None:
    """Move the files of a complete conversion that was interrupted while moving; every step can be repeated."""
    ready = folder / COMMIT_NAME
    if not ready.is_dir():
        return
    files = [p for p in ready.iterdir() if p.name != MANIFEST_NAME]
    if (ready / MANIFEST_NAME).is_file():
        listed = _listed_files(ready / MANIFEST_NAME)
        for name in _listed_files(folder / MANIFEST_NAME) - listed:
            (folder / name).unlink(missing_ok=True)
        for path in files:
            path.replace(folder / path.name)
        (ready / MANIFEST_NAME).replace(folder / MANIFEST_NAME)
        sync_dir(folder)
    shutil.rmtree(ready, ignore_errors=True)


def recover(folder: Path) -> None:
    """Complete a conversion that was killed while moving its files; leave one alone that is still at it. For who reads `folder`."""
    ready = folder / COMMIT_NAME
    with os_errors(folder):
        if not ready.is_dir():
            return
        lock = _lock(ready)
        if lock is None and os.name == "posix":
            return
        finish_commit(folder)
        if lock is not None:
            os.close(lock)


def _listed_files(manifest: Path) -> set[str]:
    """Names of the plain files a manifest lists; none where it cannot be read, so that nothing is removed on a guess."""
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {str(name) for name in files if Path(name).name == name}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return set()
