"""The audit log's chain: each entry's hash covers all of it and the hash before.

    hash = SHA-256 of the JSON list [previous, number, at, actor, action, subject, model_sha256, detail], sorted keys, no spaces, ASCII

Plain SHA-256 and not a keyed hash, on purpose: whoever can change rows has opened the store and with it any key that lies in it, so that
a key would add nothing; and without one, a log that was handed out (`edgemed audit show --json`) can be checked by anybody, with ten
lines of any language. What stands against a chain that was computed anew from some entry on is a head (number and hash) noted outside:
on paper, in a mail. The records' own hashes inside entries *are* keyed (access.py), because those are of short texts.

The newest number and hash are also kept in `meta`, so that entries cut off at the end are missed without a noted head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from edgemed.clinic.records import AuditEntry
from edgemed.clinic.store.database import Database
from edgemed.clinic.store.rows import read_time, spell, spell_time
from edgemed.core.errors import AuditError

NOTHING = "0" * 64
COLUMNS = "number, at, actor, action, subject, model_sha256, detail, hash"
PIECE = 500
ADVICE = "Keep the files as they are, note who had the passphrase, and compare with the last backup."


def entry_hash(entry: AuditEntry, previous: str) -> str:
    """The hash of an entry after the one whose hash is `previous`."""
    fields = [previous, entry.number, spell_time(entry.at), entry.actor, entry.action, entry.subject, entry.model_sha256, entry.detail]
    return hashlib.sha256(spell(fields).encode()).hexdigest()


def load_head(db: Database) -> tuple[int, str]:
    """The newest entry's number and hash, as `meta` remembers them."""
    row = db.row("SELECT value FROM meta WHERE name = 'audit_head'")
    if row is None:
        return 0, NOTHING
    try:
        number, _, digest = row[0].partition(":")
        return int(number), digest
    except (TypeError, ValueError) as error:
        raise AuditError("Expected the audit log's newest number and hash in the case store, found something else.", ADVICE) from error


def append_entry(db: Database, entry: AuditEntry) -> AuditEntry:
    """Add `entry` after the head, inside the caller's transaction; as it was written."""
    number, previous = load_head(db)
    entry = replace(entry, number=number + 1)
    entry = replace(entry, hash=entry_hash(entry, previous))
    values = (
        entry.number,
        spell_time(entry.at),
        entry.actor,
        entry.action,
        entry.subject,
        entry.model_sha256,
        spell(entry.detail),
        entry.hash,
    )
    db.run(f"INSERT INTO audit ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)
    db.run("INSERT OR REPLACE INTO meta (name, value) VALUES ('audit_head', ?)", (f"{entry.number}:{entry.hash}",))
    return entry


def load_entries(db: Database, first: int = 1, limit: int | None = None) -> list[AuditEntry]:
    """Entries from number `first` on."""
    rows = db.rows(f"SELECT {COLUMNS} FROM audit WHERE number >= ? ORDER BY number LIMIT ?", (first, -1 if limit is None else limit))
    return [_read_entry(row) for row in rows]


def _read_entry(row: tuple[Any, ...]) -> AuditEntry:
    number, at, actor, action, subject, model_sha256, detail, digest = row
    try:
        if not all(isinstance(text, str) for text in row[1:]):
            raise TypeError("bytes for text")
        return AuditEntry(number, read_time(at), actor, action, subject, model_sha256, dict(json.loads(detail)), digest)
    except (ValueError, TypeError) as error:
        raise AuditError(f"Entry {number} of the audit log was changed: it cannot be read.", ADVICE) from error


def verify_chain(db: Database) -> Iterator[AuditEntry]:
    """All entries in order. AuditError names the first that was changed or is missing."""
    number, previous = 0, NOTHING
    while piece := load_entries(db, number + 1, PIECE):
        for entry in piece:
            number += 1
            if entry.number != number:
                raise AuditError(f"Entry {number} of the audit log is missing: expected it, found entry {entry.number}.", ADVICE)
            if (found := entry_hash(entry, previous)) != entry.hash:
                raise AuditError(
                    f"Entry {number} of the audit log was changed: expected hash {entry.hash[:16]}…, found {found[:16]}….", ADVICE
                )
            previous = entry.hash
            yield entry
    expected = load_head(db)
    if expected != (number, previous):
        raise AuditError(f"The end of the audit log is missing: expected {expected[0]} entries, found {number}.", ADVICE)
