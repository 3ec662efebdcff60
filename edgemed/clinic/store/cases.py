"""Cases and who they are about: the list, the search, and what every other part of a case needs to know about it."""

from __future__ import annotations

from edgemed.clinic.records import Case, PatientIdentity
from edgemed.clinic.store.access import Change
from edgemed.clinic.store.audit import CASE_DELETED
from edgemed.clinic.store.database import Database
from edgemed.clinic.store.rows import CASE, IDENTITY, read_case, read_identity, spell_time, storable
from edgemed.clinic.store.search import find_cases, index_text
from edgemed.clinic.store.vault import Vault
from edgemed.core.errors import StoreError

_COUNTS = """
    (SELECT count(*) FROM image WHERE case_id = cases.id),
    (SELECT count(*) FROM message WHERE case_id = cases.id),
    (SELECT signed_by <> '' FROM report WHERE case_id = cases.id ORDER BY version DESC LIMIT 1)"""


class Cases(Vault):
    """The cases of a store."""

    def create_case(self, label: str, identity: PatientIdentity | None = None) -> Case:
        """A new case, with its patient where one is named."""
        with self._access.changing() as change:
            case_id, now = self._access.means.new_id(), spell_time(change.at)
            change.db.run(f"INSERT INTO cases ({CASE}) VALUES (?, ?, ?, ?)", (case_id, storable(label), now, now))
            index_text(change.db, case_id, "case", case_id, label)
            change.note("case.created", case_id, kind="case", case_id=case_id)
            if identity is not None:
                _write_identity(change, case_id, identity)
        return self.load_case(case_id)

    def rename_case(self, case_id: str, label: str) -> None:
        """Give a case another label."""
        with self._access.changing() as change:
            mark_changed(change, case_id)
            change.db.run("UPDATE cases SET label = ? WHERE id = ?", (storable(label), case_id))
            index_text(change.db, case_id, "case", case_id, label)
            change.note("case.renamed", case_id, kind="case", case_id=case_id)

    def delete_case(self, case_id: str) -> None:
        """Remove a case and all in it. Its pages are overwritten and given back; that it was there stays in the audit log."""
        with self._access.changing() as change:
            require_case(change.db, case_id)
            change.db.run("DELETE FROM words WHERE rowid IN (SELECT id FROM document WHERE case_id = ?)", (case_id,))
            change.db.run("DELETE FROM cases WHERE id = ?", (case_id,))
            change.note(CASE_DELETED, case_id)
        with self._access.reading() as db:
            db.shrink()

    def list_cases(self, search: str = "", limit: int = 200) -> list[Case]:
        """Cases, newest change first; with `search`, those in which each of its words begins a word somewhere."""
        where, values = find_cases(search)
        with self._access.reading() as db:
            rows = db.rows(f"SELECT {CASE}, {_COUNTS} FROM cases {where} ORDER BY changed DESC, id LIMIT ?", (*values, limit))
        return [read_case(row) for row in rows]

    def load_case(self, case_id: str) -> Case:
        """One case. StoreError where there is none."""
        with self._access.reading() as db:
            row = db.row(f"SELECT {CASE}, {_COUNTS} FROM cases WHERE id = ?", (case_id,))
        if row is None:
            raise no_such_case(case_id)
        return read_case(row)

    def load_identity(self, case_id: str) -> PatientIdentity:
        """Who the patient is; an empty one where nobody said."""
        with self._access.reading() as db:
            require_case(db, case_id)
            row = db.row(f"SELECT {IDENTITY} FROM identity WHERE case_id = ?", (case_id,))
        return PatientIdentity() if row is None else read_identity(row)

    def save_identity(self, case_id: str, identity: PatientIdentity) -> None:
        """Say who the patient is."""
        with self._access.changing() as change:
            mark_changed(change, case_id)
            _write_identity(change, case_id, identity)


def _write_identity(change: Change, case_id: str, identity: PatientIdentity) -> None:
    values = [storable(v) for v in (identity.name, identity.patient_id, identity.birth_date, identity.sex)]
    values += [storable(identity.accession), storable(identity.study_uid)]
    change.db.run(f"INSERT OR REPLACE INTO identity (case_id, {IDENTITY}) VALUES (?, ?, ?, ?, ?, ?, ?)", (case_id, *values))
    # DICOM's names have carets between their parts; the index takes those for spaces.
    index_text(change.db, case_id, "identity", case_id, " ".join(values))
    change.note("identity.saved", case_id, kind="identity", case_id=case_id)


def no_such_case(case_id: str) -> StoreError:
    """The error for a case that is not there."""
    return StoreError(f"Expected case {case_id} in the store, found none.", "Look it up in the list of cases.")


def require_case(db: Database, case_id: str) -> None:
    """StoreError where there is no such case."""
    if db.row("SELECT 1 FROM cases WHERE id = ?", (case_id,)) is None:
        raise no_such_case(case_id)


def mark_changed(change: Change, case_id: str) -> None:
    """Put a case on top of the list. StoreError where there is none."""
    if not change.db.run("UPDATE cases SET changed = ? WHERE id = ?", (spell_time(change.at), case_id)):
        raise no_such_case(case_id)
