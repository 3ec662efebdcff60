"""Who may touch the file when: one connection under one lock, and every change with its audit entry in the same transaction.

    with access.reading() as db: …
    with access.changing() as change:
        change.db.run("INSERT …")
        change.note("case.created", case_id, kind="case", case_id=case_id)

`note` with a `kind` writes a keyed hash of the row as it now is into the entry, so that `AuditLog.verify` finds a row that was changed
behind the log's back. The key lies in the store: a short answer cannot be guessed from a log that was handed to somebody.
"""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from threading import RLock
from typing import Any

from edgemed.clinic.records import AuditEntry
from edgemed.clinic.store.chain import append_entry
from edgemed.clinic.store.database import RESTORE, Database
from edgemed.clinic.store.keys import KdfCost
from edgemed.clinic.store.rows import spell, storable
from edgemed.core.errors import AuditError, StoreError

# kind: what of a row is under the log's protection, and the table it lies in. `cases.changed` follows from the rest.
RECORDS = {
    "case": ("id, label, created", "cases", "id"),
    "identity": ("case_id, name, patient_id, birth_date, sex, accession, study_uid", "identity", "case_id"),
    "image": ("id, case_id, name, added, sha256, size_bytes, facts, view, place", "image", "id"),
    "message": ("id, case_id, role, text, created, images, model, state, confidence, verdict, place", "message", "id"),
    "report": (
        "id, case_id, version, findings, impression, recommendation, drafted_by, edited, signed_by, signed_at",
        "report",
        "id",
    ),
    "setting": ("name, value", "setting", "name"),
}


def utc_now() -> datetime:
    """The time of entries and records."""
    return datetime.now(timezone.utc)


def awake_and_asleep_s() -> float:
    """Seconds that also pass while a laptop sleeps, where the system has such a clock: closing the lid counts as idle."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def new_id() -> str:
    """32 random hex digits."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class Means:
    """What a store takes from the machine. Tests put their own in; `cost` is for new passphrases, old ones keep theirs."""

    now: Callable[[], datetime] = field(default=utc_now)
    idle_clock_s: Callable[[], float] = field(default=awake_and_asleep_s)
    new_id: Callable[[], str] = field(default=new_id)
    cost: KdfCost = KdfCost()


def record_hash(key: bytes, row: tuple[Any, ...]) -> str:
    """HMAC-SHA256 of a row in one spelling. A row that was changed may hold anything, bytes included."""
    values = [{"bytes": value.hex()} if isinstance(value, bytes) else value for value in row]
    return hmac.new(key, spell(values).encode(), hashlib.sha256).hexdigest()


def record_key(db: Database) -> bytes:
    """The key of `record_hash`, made with the store."""
    row = db.row("SELECT value FROM meta WHERE name = 'record_key'")
    try:
        return bytes.fromhex(row[0] if row else "none")
    except (TypeError, ValueError) as error:
        raise AuditError("Expected the audit log's key in the case store, found none.", RESTORE) from error


@dataclass(frozen=True)
class Change:
    """A change in the making."""

    db: Database
    actor: str
    at: datetime

    def note(
        self,
        action: str,
        subject: str = "",
        *,
        kind: str = "",
        case_id: str = "",
        model_sha256: str = "",
        detail: dict[str, str] | None = None,
    ) -> AuditEntry:
        """Add the audit entry; with `kind`, with the hash of that record as it now is."""
        said = dict(detail or {})
        if case_id:
            said["case"] = case_id
        if kind:
            columns, table, key = RECORDS[kind]
            row = self.db.row(f"SELECT {columns} FROM {table} WHERE {key} = ?", (subject,))
            assert row is not None, "a record is noted after it was written"
            said |= {"record_kind": kind, "record": record_hash(record_key(self.db), row)}
        return append_entry(self.db, AuditEntry(0, self.at, storable(self.actor), action, subject, model_sha256, said))


class Access:
    """The connection, while there is one, and the lock around it."""

    def __init__(self, actor: str, means: Means) -> None:
        self.actor = actor
        self.means = means
        self.lock = RLock()
        self.db: Database | None = None

    @contextmanager
    def reading(self) -> Iterator[Database]:
        """The database, for this thread alone. StoreError while the store is locked."""
        with self.lock:
            if self.db is None:
                raise StoreError("The case store is locked.", "Unlock it with the passphrase.")
            yield self.db

    @contextmanager
    def changing(self) -> Iterator[Change]:
        """A transaction, for this thread alone."""
        with self.reading() as db, db.transaction():
            yield Change(db, self.actor, self.means.now())
