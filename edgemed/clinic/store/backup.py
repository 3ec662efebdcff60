"""A backup is one file: the pages of the store under a data key of their own, then how a passphrase opens them.

    save_backup(db, target, backup_key, salt, cost)      # whole or not there
    with open_backup(path, passphrase) as source: …      # checked as a whole, then a read-only Database

    pages (SQLCipher) | sealed key (JSON, with the pages' size and SHA-256) | its length, 4 bytes | b"EDGEMED-BACKUP-1"

One file, because a stick loses one of two. The part that tells comes last, because the pages are written by SQLite first and are not
known before; so a copy that was cut has no end and is refused. Nothing lies in clear: not even a patient's name in a table of contents.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgemed.clinic.store.database import Database
from edgemed.clinic.store.keys import KdfCost, SealedKey, derive, new_key, seal, unseal
from edgemed.core.errors import StoreError
from edgemed.core.files import CHUNK_BYTES, PART_SUFFIX, atomic_path, os_errors, remove_stale, sha256_file

MAGIC = b"EDGEMED-BACKUP-1"
_LENGTH_BYTES = 4
_MOST_BOX_BYTES = 1 << 16


@dataclass(frozen=True)
class BackupEnd:
    """What the end of a backup says: its sealed key, and where its pages end."""

    box: SealedKey
    pages_bytes: int


def save_backup(db: Database, target: Path, backup_key: bytes, salt: bytes, cost: KdfCost) -> str:
    """Write a backup of `db`; the SHA-256 of its pages. The caller holds the lock, so that nothing changes meanwhile."""
    for name in ("*.edgemed-backup", glob.escape(target.name)):  # of which a stick would fill up unseen
        remove_stale(target.parent, f".{name}.*{PART_SUFFIX}")
    with atomic_path(target, 0o600) as part:
        data_key = new_key()
        db.copy_into(part, data_key, target)
        pages_sha256 = sha256_file(part)
        facts: dict[str, int | str] = {"pages_bytes": part.stat().st_size, "pages_sha256": pages_sha256}
        box = seal("backup", data_key, backup_key, salt, cost, facts).to_json()
        with part.open("ab") as f:
            f.write(box + len(box).to_bytes(_LENGTH_BYTES, "big") + MAGIC)
        _prove(part, data_key)
    return pages_sha256


def _prove(part: Path, data_key: bytes) -> None:
    """Read every page back: a backup that does not open is none."""
    copy = Database.open_read_only(part, data_key)
    try:
        copy.check_pages("Write it again, or use another backup.")
    finally:
        copy.close()


def load_end(backup: Path) -> BackupEnd:
    """Read the end of a backup. StoreError where it is none, or was cut."""
    with os_errors(backup), backup.open("rb") as f:
        size = f.seek(0, os.SEEK_END)
        f.seek(max(0, size - _LENGTH_BYTES - len(MAGIC)))
        tail = f.read()
        length = int.from_bytes(tail[:_LENGTH_BYTES], "big")
        start = size - len(tail) - length
        if tail[_LENGTH_BYTES:] != MAGIC or length > _MOST_BOX_BYTES or start < 0:
            raise StoreError(f"Expected a whole backup in {backup.name}, found another file or one that was cut.", "Copy it again.")
        f.seek(start)
        box = SealedKey.from_json(f.read(length), backup.name)
    if box.purpose != "backup":
        raise StoreError(f"Expected a backup's key in {backup.name}, found a store's.", "Use another backup.")
    return BackupEnd(box, start)


@contextmanager
def open_backup(backup: Path, passphrase: str) -> Iterator[Database]:
    """A backup's pages, to be read, after the passphrase and all of its bytes were checked."""
    end = load_end(backup)
    key = unseal(end.box, derive(passphrase, end.box.salt, end.box.cost).backup)
    with os_errors(backup):
        found: tuple[int | str, int | str] = end.pages_bytes, _sha256_of_start(backup, end.pages_bytes)
    if found != (end.box.facts.get("pages_bytes"), end.box.facts.get("pages_sha256")):
        raise StoreError(f"Expected the pages that were backed up in {backup.name}, found changed ones.", "Copy it again, or use another.")
    db = Database.open_read_only(backup, key)
    try:
        db.check_pages("Use another backup.")
        yield db
    finally:
        db.close()


def _sha256_of_start(path: Path, size_bytes: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while size_bytes > 0 and (piece := f.read(min(CHUNK_BYTES, size_bytes))):
            digest.update(piece)
            size_bytes -= len(piece)
    return digest.hexdigest()
