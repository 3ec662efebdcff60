"""The tables, as numbered migrations: a store of version N has had the first N of them, each in a transaction of its own.

    migrate(db, note)        # StoreError where the file is newer than this edgemed

Add a migration at the end; never change one that was released. `user_version` of the file holds its number. The columns that the audit
log hashes are named in access.py; one that is added there needs entries for the rows that are there already, or `verify` would find those
changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from edgemed.clinic.store.database import RESTORE, Database
from edgemed.core.errors import StoreError

Migration = Callable[[Database], None]

_V1 = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "CREATE TABLE cases (id TEXT PRIMARY KEY, label TEXT NOT NULL, created TEXT NOT NULL, changed TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX cases_changed ON cases (changed)",
    """CREATE TABLE identity (
        case_id TEXT PRIMARY KEY REFERENCES cases ON DELETE CASCADE, name TEXT NOT NULL, patient_id TEXT NOT NULL,
        birth_date TEXT NOT NULL, sex TEXT NOT NULL, accession TEXT NOT NULL, study_uid TEXT NOT NULL) WITHOUT ROWID""",
    """CREATE TABLE image (
        place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, case_id TEXT NOT NULL REFERENCES cases ON DELETE CASCADE,
        name TEXT NOT NULL, added TEXT NOT NULL, sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL, facts TEXT NOT NULL,
        view TEXT NOT NULL)""",
    "CREATE INDEX image_case ON image (case_id)",
    "CREATE TABLE image_data (image_id TEXT PRIMARY KEY REFERENCES image (id) ON DELETE CASCADE, data BLOB NOT NULL)",
    """CREATE TABLE message (
        place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, case_id TEXT NOT NULL REFERENCES cases ON DELETE CASCADE,
        role TEXT NOT NULL, text TEXT NOT NULL, created TEXT NOT NULL, images TEXT NOT NULL, model TEXT NOT NULL,
        state TEXT NOT NULL, confidence TEXT NOT NULL, verdict TEXT NOT NULL)""",
    "CREATE INDEX message_case ON message (case_id)",
    """CREATE TABLE report (
        id TEXT PRIMARY KEY, case_id TEXT NOT NULL REFERENCES cases ON DELETE CASCADE, version INTEGER NOT NULL,
        findings TEXT NOT NULL, impression TEXT NOT NULL, recommendation TEXT NOT NULL, drafted_by TEXT NOT NULL,
        edited INTEGER NOT NULL, signed_by TEXT NOT NULL, signed_at TEXT NOT NULL, UNIQUE (case_id, version)) WITHOUT ROWID""",
    """CREATE TRIGGER report_signed BEFORE UPDATE ON report WHEN OLD.signed_by <> ''
        BEGIN SELECT RAISE(ABORT, 'a signed report does not change'); END""",
    """CREATE TABLE audit (
        number INTEGER PRIMARY KEY, at TEXT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL, subject TEXT NOT NULL,
        model_sha256 TEXT NOT NULL, detail TEXT NOT NULL, hash TEXT NOT NULL)""",
    "CREATE TRIGGER audit_update BEFORE UPDATE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END",
    "CREATE TRIGGER audit_delete BEFORE DELETE ON audit BEGIN SELECT RAISE(ABORT, 'the audit log is only added to'); END",
    # What is searched: one document a label, identity, message and report; the index has its words, `document` whose they are.
    """CREATE TABLE document (
        id INTEGER PRIMARY KEY, case_id TEXT NOT NULL REFERENCES cases ON DELETE CASCADE, kind TEXT NOT NULL, subject TEXT NOT NULL,
        UNIQUE (kind, subject))""",
    "CREATE INDEX document_case ON document (case_id)",
    "CREATE VIRTUAL TABLE words USING fts5 (text, tokenize = 'unicode61 remove_diacritics 2')",
    "INSERT INTO words (words, rank) VALUES ('secure-delete', 1)",  # removed words leave the index at once
)


def _create_tables(db: Database) -> None:
    for statement in _V1:
        db.run(statement)


MIGRATIONS: Sequence[Migration] = (_create_tables,)


def migrate(db: Database, note: Callable[[int], object], created: bool = False) -> None:
    """Bring `db` to the newest version; `note` is called with each version inside its transaction. `created`: `db` may be empty."""
    found = db.rows("PRAGMA user_version")[0][0]
    if found > len(MIGRATIONS):
        raise StoreError(
            f"Expected a case store of version {len(MIGRATIONS)} or older, found version {found}: a newer edgemed wrote it.",
            "Update edgemed: pip install --upgrade 'edgemed[clinic]'",
        )
    if found == 0 and not created:
        raise StoreError(f"Expected a case store in {db.path.name}, found a file without its tables.", RESTORE)
    for number, step in enumerate(MIGRATIONS[found:], found + 1):
        with db.transaction():
            step(db)
            db.run(f"PRAGMA user_version = {number}")
            note(number)
