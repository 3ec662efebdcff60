"""Files that are whole or not there: hashes, atomic writes, and the border where OSError becomes our error."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgemed.core.errors import EdgemedError, InputError, ResourceError

CHUNK_BYTES = 1 << 20
# Written files are first named `.NAME.RANDOM.part`; whatever is left of a killed run is recognised by this.
PART_SUFFIX = ".part"
# What nobody has written to for so long was left by a run that was killed.
LEFT_AFTER_S = 3600.0
_PLACES = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ELOOP)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while piece := f.read(CHUNK_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def describe_os_error(error: OSError, path: Path) -> EdgemedError:
    """One sentence for what the operating system refused."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(f"The disk is full while writing {path}.", "Free some space, or choose another folder.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        said = f"Reading or writing {path} is not permitted for this account."
        return ResourceError(said, "Choose another place, or change its permissions.")
    if error.errno == errno.ENAMETOOLONG:
        return InputError(f"Expected a shorter name than {str(path)[:60]}… for a file.", "Check the path.")
    if error.errno == errno.EMFILE:
        return ResourceError(f"Too many files are open to open {path} too.", "Raise the limit (ulimit -n), or close other programs.")
    if error.errno in _PLACES:
        return _describe_place(error.errno, path)
    return ResourceError(f"The system refused {path}: {error.strerror or error}.", "Check the disk and the path.")


def found_at(path: Path, nothing: str = "none") -> str:
    """What is at `path`, for the end of a sentence that told what was expected there; `nothing`: the words where nothing is."""
    if os.path.isdir(path):
        return "a folder"
    if os.path.isfile(path):
        return "a file"
    if os.path.exists(path):
        return "something that is neither file nor folder"
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "links that lead in a circle"
    return "a link that leads nowhere" if path.is_symlink() else nothing


def _describe_place(number: int, path: Path) -> InputError:
    """For a file in a folder's place or the other way round, or nothing where something should be."""
    if number == errno.EISDIR:
        return InputError(f"Expected a file at {path}, found a folder.", "Check the path.")
    above = next((p for p in reversed(path.parents) if not os.path.isdir(p)), path)
    if not os.path.lexists(above):
        return InputError(f"Expected a file or folder at {path}, found none.", "Check the path.")
    wanted = "a folder" if above != path or number in (errno.ENOTDIR, errno.EEXIST) else "a file or folder"
    return InputError(f"Expected {wanted} at {above}, found {'none' if os.path.isdir(above) else found_at(above)}.", "Check the path.")


def real_path(path: Path) -> Path:
    """Absolute, links followed. Unlike Path.resolve, which raises RuntimeError, it takes links that lead in a circle as they are."""
    return Path(os.path.realpath(path))


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError raised inside into an EdgemedError about `path`."""
    try:
        yield
    except OSError as error:
        raise describe_os_error(error, path) from error


def require_writable(folder: Path) -> None:
    """That a file can be written into `folder`, before the work that it is for. Raises ResourceError, InputError."""
    with os_errors(folder), tempfile.TemporaryFile(dir=folder):
        pass


def sync_dir(folder: Path) -> None:
    """Make a rename in `folder` durable, where the platform lets a folder be synced."""
    if os.name != "posix":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_path(target: Path, mode: int = 0o644) -> Iterator[Path]:
    """A temporary path beside `target` that is synced, given `mode` and renamed onto it on success, removed on failure."""
    with os_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        fd, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PART_SUFFIX, dir=target.parent)
        os.close(fd)
        part = Path(name)
        try:
            yield part
            with part.open("rb+") as f:
                os.fsync(f.fileno())
            with suppress(PermissionError):  # a stick's FAT has no owners, and may refuse; what was made is its user's alone already
                part.chmod(mode)
            part.replace(target)
            sync_dir(target.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that is synced and renamed to it on success, removed on failure.

    Raises InputError where `target` holds something already.
    """
    with os_errors(target):
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"Expected no files at {target}, found some.", "Choose another folder with --out.")
        if os.path.lexists(target) and not target.is_dir():
            raise InputError(f"Expected a new or empty folder at {target}, found {found_at(target)}.", "Choose another one with --out.")
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=PART_SUFFIX, dir=target.parent))
        try:
            yield part
            sync_tree(part)
            part.chmod(0o755)
            if target.is_dir():
                target.rmdir()
            part.replace(target)
            sync_dir(target.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Make every file of a folder durable."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            sync_dir(path)
            continue
        with path.open("rb+") as f:
            os.fsync(f.fileno())
    sync_dir(folder)


def remove_stale(folder: Path, pattern: str) -> None:
    """Remove what killed runs left in `folder` under names like `pattern`; not what another program may be writing."""
    for path in folder.glob(pattern):
        with suppress(OSError):
            if time.time() - max(p.lstat().st_mtime for p in (path, *path.rglob("*"))) > LEFT_AFTER_S:
                (shutil.rmtree if path.is_dir() else os.unlink)(path)


def save_bytes(target: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `target`, whole or not at all."""
    with atomic_path(target, mode) as part:
        part.write_bytes(data)


def save_text(target: Path, text: str) -> None:
    """Write UTF-8 text to `target`, whole or not at all."""
    save_bytes(target, text.encode())


def whole_lines(path: Path) -> list[str]:
    """The lines of a file that is only ever appended to. A last one without its line feed was cut by a kill, and left out."""
    if not path.is_file():
        return []
    with os_errors(path):
        text = path.read_bytes().decode(errors="replace")
    return text[: text.rfind("\n") + 1].split("\n")[:-1]


def drop_cut_line(path: Path) -> None:
    """Remove what a killed run left behind the last whole line, before more is appended."""
    if path.is_file():
        with os_errors(path):
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
