"""The case store's lock: one program at a time (edgemed/core/filelock.py).

    lock = StoreLock(Path("cases.db.lock"))
    lock.acquire()        # StoreError where another program has it
"""

from __future__ import annotations

from pathlib import Path

from edgemed.core.errors import StoreError
from edgemed.core.filelock import FileLock


class StoreLock(FileLock):
    """The lock in `path`, beside the store."""

    def __init__(self, path: Path) -> None:
        busy = StoreError(f"The case store beside {path.name} is in use by another program.", "Close the other edgemed, then try again.")
        super().__init__(path, busy)
