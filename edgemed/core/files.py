"""Files that are whole or not there: hashes, atomic writes, and the border where OSError becomes our error."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgemed.core.errors import EdgemedError, InputError, ResourceError

CHUNK_BYTES = 1 << 20
# Written files are first named `.NAME.RANDOM.part`; whatever is left of a killed run is recognised by this.
PART_SUFFIX = ".part"


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
        return ResourceError(f"The disk is full while writing {path}.", "Free some space or choose another folder with --out.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ResourceError(f"Writing {path} is not permitted.", "Choose another folder with --out or change its permissions.")
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return InputError(f"Expected a file or folder at {path}, found none.", "Check the path.")
    return ResourceError(f"The system refused {path}: {error.strerror or error}.", "Check the disk and the path.")


@contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError raised inside into an EdgemedError about `path`."""
    try:
        yield
    except OSError as error:
        raise describe_os_error(error, path) from error


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


def save_bytes(target: Path, data: bytes, mode: int = 0o644) -> None:
    """Write `data` to `target`, whole or not at all."""
    with atomic_path(target, mode) as part:
        part.write_bytes(data)


def save_text(target: Path, text: str) -> None:
    """Write UTF-8 text to `target`, whole or not at all."""
    save_bytes(target, text.encode())
