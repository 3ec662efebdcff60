"""One program at a time: a lock of the operating system on a file, gone with the process that held it.

    lock = FileLock(folder / ".lock", ResourceError("Another edgemed works on this folder.", "Wait for it."))
    lock.acquire()        # the error that was handed over, where another program has it
    lock.release()

    with lock: ...        # the same

On a network share it is as good as the share's own locks.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path

from edgemed.core.errors import EdgemedError
from edgemed.core.files import os_errors

# Seconds between two tries of `wait`.
_PAUSE_S = 0.2

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

    def __init__(self, path: Path, busy: EdgemedError) -> None:
        """`busy` is raised where another program has the lock."""
        self.path = path
        self._busy = busy
        self._fd: int | None = None

    def acquire(self) -> None:
        """Take it at once or raise."""
        if not self._try():
            raise self._busy

    def wait(self) -> None:
        """Take it as soon as the other program gives it back."""
        while not self._try():
            time.sleep(_PAUSE_S)

    def _try(self) -> bool:
        if self._fd is not None:
            return True
        with os_errors(self.path):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            _take(fd)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                return False
            raise self._busy from error
        self._fd = fd
        return True

    def release(self) -> None:
        """Give it back. Unlocked by name, not only closed: a forked child may hold the same file open."""
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            _give(fd)
        finally:
            os.close(fd)

    def __enter__(self) -> FileLock:
        self.acquire()
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()
