"""One encrypted SQLite file: how it is opened, what a transaction is, and the border where SQLite's errors become ours.

    db = Database.open(path, key)
    with db.transaction():
        db.run("INSERT …", (…))

What a transaction wrote is on disk when it ends (write-ahead log, synced at each commit). SQLite's own checkpoints are off: the main
file changes only at `checkpoint` (at opening, closing, and when the log has grown large), so that between them the main file stands still
and the log only grows. A copy of both at any moment then opens, and so does one whose log was cut. (A copy that is taken *during* a
checkpoint, over some time, can be damaged, as with any database: `edgemed cases backup` waits for its turn.)

`locking_mode=EXCLUSIVE` keeps the log's index in memory: no third file, no memory map that a full disk can tear. Temporary tables stay in
memory. Not thread-safe; access.py holds the lock. Knows no tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from edgemed.core.errors import EdgemedError, InputError, MissingExtraError, ResourceError, StoreError
from edgemed.core.files import os_errors

PAGE_BYTES = 4096
# More than most sessions write, so that the main file stands still in them; and little enough that a full disk is soon free enough for
# moving the log, which needs as much space again.
LARGE_LOG_BYTES = 64 << 20
_SETTINGS = (
    "locking_mode = EXCLUSIVE",  # before the first page is read, or the log's index becomes a file
    "journal_mode = WAL",
    "synchronous = FULL",
    "wal_autocheckpoint = 0",
    "secure_delete = ON",
    "foreign_keys = ON",
    "temp_store = MEMORY",
    "trusted_schema = OFF",
)
_DAMAGE = ("SQLITE_NOTADB", "SQLITE_CORRUPT")
# Errors of a copy come without a name; a copy from a damaged page is a logic error.
_UNNAMED = {"database or disk is full": "SQLITE_FULL", "disk I/O error": "SQLITE_IOERR", "SQL logic error": "SQLITE_CORRUPT"}
RESTORE = "Move the store's files to another folder, then restore the last backup: edgemed cases restore BACKUP."


def driver() -> Any:
    """SQLCipher's Python module."""
    try:
        from sqlcipher3 import dbapi2
    except ImportError as error:
        raise MissingExtraError.of("The case store", "clinic") from error
    return dbapi2


@contextmanager
def sqlite_errors(path: Path) -> Iterator[None]:
    """Turn an error of SQLite raised inside into an EdgemedError about `path`. Its texts hold names of columns, never values."""
    try:
        yield
    except (driver().Error, MemoryError) as error:
        raise describe_sqlite_error(error, path) from error


def error_kind(error: BaseException) -> str:
    """SQLite's name of an error, without its finer part: SQLITE_IOERR_WRITE is a kind of SQLITE_IOERR."""
    name = "SQLITE_NOMEM" if isinstance(error, MemoryError) else str(getattr(error, "sqlite_errorname", ""))
    return "_".join(name.split("_")[:2]) or _UNNAMED.get(str(error), "")


def describe_sqlite_error(error: Exception, path: Path) -> EdgemedError:
    """One sentence for what SQLite refused, by its error code."""
    name, kind = str(getattr(error, "sqlite_errorname", type(error).__name__)), error_kind(error)
    if kind == "SQLITE_FULL":
        return ResourceError(f"The disk is full while writing {path.name}; what was saved before is safe.", "Free some space, try again.")
    if kind in _DAMAGE:
        return StoreError(f"Expected a whole case store in {path.name}, found a damaged file.", RESTORE)
    if kind in ("SQLITE_BUSY", "SQLITE_LOCKED"):
        return StoreError(f"The case store {path.name} is in use by another program.", "Close the other edgemed, then try again.")
    if kind in ("SQLITE_IOERR", "SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM"):
        return ResourceError(f"The system refused to read or write {path.name} ({name}).", "Check the disk, and its permissions.")
    if kind == "SQLITE_NOMEM":
        return ResourceError("The machine has too little memory for this.", "Close other programs.")
    if kind == "SQLITE_TOOBIG":
        return InputError("Expected a text or file of less than 1 GB, found a larger one.", "Split or shrink it.")
    return StoreError(f"The case store {path.name} refused a change ({name}).", "Check it with: edgemed audit verify")


class Database:
    """An open encrypted file.

    SQLCipher gives a connection up for good when it meets one page that cannot be decrypted. It is opened again then, with the key that
    is kept here until `close`, so that one damaged image costs that image and not the rest.
    """

    def __init__(self, path: Path, key: bytes, settings: Sequence[str], uri: str = "") -> None:
        """Open an existing file. StoreError where it is damaged or of another key."""
        self.path = path
        self._key = bytearray(key)
        self._settings = tuple(settings)
        self._address = uri or str(path)
        self._log = path.with_name(path.name + "-wal")
        with sqlite_errors(path):
            self.raw = self._connect()

    @classmethod
    def open(cls, path: Path, key: bytes) -> Database:
        """Open an existing file for reading and writing."""
        return cls(path, key, _SETTINGS)

    @classmethod
    def create(cls, path: Path, key: bytes) -> Database:
        """Open an empty file that only its owner may read."""
        with os_errors(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        # Before the first page is written: freed pages can be given back to the system.
        return cls(path, key, ("auto_vacuum = INCREMENTAL", *_SETTINGS))

    @classmethod
    def open_read_only(cls, path: Path, key: bytes) -> Database:
        """Open a file that nobody writes, a backup, without a log beside it."""
        return cls(path, key, ("temp_store = MEMORY",), f"{path.absolute().as_uri()}?mode=ro&immutable=1")

    def _connect(self) -> Any:
        connection = _connect(self._address, self._key)
        try:
            for setting in self._settings:
                connection.execute(f"PRAGMA {setting}").fetchall()
            connection.execute("SELECT count(*) FROM sqlite_master").fetchall()  # the first page: is the key right?
        except BaseException:
            connection.close()
            raise
        return connection

    @contextmanager
    def using(self) -> Iterator[None]:
        """The border around every use of `raw`; a connection that met a damaged page is replaced."""
        try:
            yield
        except (driver().Error, MemoryError) as error:
            if error_kind(error) in _DAMAGE:
                self._replace()
            raise describe_sqlite_error(error, self.path) from error

    def _replace(self) -> None:
        self.raw.close()
        with sqlite_errors(self.path):
            self.raw = self._connect()

    def check_pages(self, hint: str) -> None:
        """StoreError unless all pages can be decrypted and fit each other."""
        if self.rows("PRAGMA quick_check(1)") != [("ok",)]:
            self._replace()  # a page that it could not decrypt is told in words, and the connection is given up all the same
            raise StoreError(f"Expected whole pages in {self.path.name}, found a damaged file.", hint)

    def copy_into(self, target: Path, key: bytes, called: Path) -> None:
        """Write all pages into the empty file `target`, under another key, without a log or journal beside it.

        `called`: what that file will be renamed to, for errors.
        """
        with sqlite_errors(called):
            copy = _connect(str(target), key)
        try:
            copy.execute("PRAGMA journal_mode = OFF").fetchall()
            self.raw.backup(copy)
        except (driver().Error, MemoryError) as error:
            if error_kind(error) not in _DAMAGE:
                raise describe_sqlite_error(error, called) from error
            self._replace()  # what was empty cannot be damaged: it is a page of ours
            raise describe_sqlite_error(error, self.path) from error
        finally:
            copy.close()

    def run(self, sql: str, values: Sequence[Any] = ()) -> int:
        """One statement that changes something; how many rows it changed."""
        with self.using(), closing(self.raw.execute(sql, values)) as cursor:
            return int(cursor.rowcount)

    def rows(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows of a query."""
        with self.using(), closing(self.raw.execute(sql, values)) as cursor:
            return list(cursor.fetchall())

    def row(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...] | None:
        """The first row of a query, or None."""
        found = self.rows(sql, values)
        return found[0] if found else None

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of what is run inside, or nothing; on disk when it ends."""
        self.run("BEGIN IMMEDIATE")
        try:
            yield
            self.run("COMMIT")
        except BaseException:
            with suppress(EdgemedError):  # SQLite has already rolled back where the disk was full
                self.run("ROLLBACK")
            raise
        if self._log_bytes() >= LARGE_LOG_BYTES:
            self.checkpoint()

    def _log_bytes(self) -> int:
        try:
            return self._log.stat().st_size
        except OSError:
            return 0

    def checkpoint(self) -> None:
        """Move the log into the main file and empty it. It is only tidying: what cannot be moved now stays in the log, as safe."""
        with suppress(EdgemedError):
            self.rows("PRAGMA wal_checkpoint(TRUNCATE)")

    def shrink(self) -> None:
        """Give freed pages back to the system, and leave nothing of them in the log."""
        with suppress(EdgemedError):
            self.rows("PRAGMA incremental_vacuum")
        self.checkpoint()

    def close(self) -> None:
        """Checkpoint and close. SQLCipher wipes its key and pages."""
        self.checkpoint()
        for place in range(len(self._key)):
            self._key[place] = 0
        with suppress(driver().Error):
            self.raw.close()


def _connect(address: str, key: bytes | bytearray) -> Any:
    """A connection with its key set. Threads take turns under access.py's lock."""
    connection = driver().connect(address, isolation_level=None, check_same_thread=False, uri=address.startswith("file:"))
    connection.execute("PRAGMA cipher_log_level = NONE").fetchall()  # it would write into the terminal
    connection.execute(f"PRAGMA key = \"x'{key.hex()}'\"").fetchall()
    connection.execute(f"PRAGMA cipher_page_size = {PAGE_BYTES}").fetchall()
    connection.execute("PRAGMA cipher_memory_security = ON").fetchall()
    return connection
