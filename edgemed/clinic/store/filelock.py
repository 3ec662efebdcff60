"""One program at a time: a lock of the operating system on a file beside the store, gone with the process that held it.

    lock = FileLock(Path("cases.db.lock"))
    lock.acquire()        # StoreError where another program has it
    lock.release()

Knows no store. On a network share it is as good as the share's own locks.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edgemed.core.errors import StoreError
from edgemed.core.files import os_errors

if sys.platform == "win32":
    import msvcrt

    def _take(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)

    def _give(fd: int) -> None:
        msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)
else:
    import fcntl

    def _take(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _give(fd: int) -> None:
        fcntl.flock(fd, fcntl.LOCK_UN)


class FileLock:
    """The lock in `path`. The file stays: removing it would let two programs lock two files of one name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take it at once or raise."""
        if self._fd is not None:
            return
        with os_errors(self.path):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _take(fd)
        except OSError as error:
            os.close(fd)
            raise StoreError(
                f"The case store beside {self.path.name} is in use by another program.", "Close the other edgemed, then try again."
            ) from error
        self._fd = fd

    def release(self) -> None:
        """Give it back. Unlocked by name, not only closed: a forked child may hold the same file open."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            _give(fd)
        finally:
            os.close(fd)
