"""The audit log: who did what when, chained so that no entry can be changed, and compared with the records that it speaks of.

    number, hash = store.audit.head()          # note it on paper
    store.audit.verify(expected_head=hash)     # entries checked; AuditError names the first wrong one

`verify` walks the chain (chain.py), then replays it: what each entry says was written must be what the tables hold now (labels,
identities, images and their bytes, messages, reports, settings), nothing less and nothing more. It finds any change made without the
passphrase's owner computing the whole chain anew; against that too, there is a head noted outside the machine.

Entries hold ids, hashes and counts; whoever calls `append` keeps to it. Opening a store adds an entry, so a head seen now is found in the
log later, though no longer at its end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemed.clinic.records import AuditEntry
from edgemed.clinic.store.access import RECORDS, Access, record_hash, record_key
from edgemed.clinic.store.chain import ADVICE, load_entries, load_head, verify_chain
from edgemed.clinic.store.database import RESTORE
from edgemed.clinic.store.rows import is_whole, storable
from edgemed.core.errors import AuditError, InputError

if TYPE_CHECKING:
    from edgemed.clinic.store.database import Database

CASE_DELETED = "case.deleted"
LONGEST_DETAIL = 200
SHORTEST_HEAD = 16
# What only the store itself may say, because `verify` goes by it.
_OWN_DETAILS = {"record", "record_kind"}

Key = tuple[str, str]


@dataclass(frozen=True)
class _Noted:
    """What the log last said about a record."""

    number: int
    record: str
    case_id: str


class AuditLog:
    """The log of one store. All methods raise StoreError while that is locked."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def append(self, action: str, subject: str = "", model_sha256: str = "", detail: dict[str, str] | None = None) -> AuditEntry:
        """Add an entry about something outside the store, such as an export. Ids and hashes only, never content."""
        said = {key: storable(value) for key, value in (detail or {}).items()}
        if _OWN_DETAILS & set(said) or action == CASE_DELETED:
            raise ValueError("the store alone says what became of its records")
        if any(len(text) > LONGEST_DETAIL for text in (action, subject, model_sha256, *said, *said.values())):
            raise ValueError("an entry holds ids and hashes, no content")
        with self._access.changing() as change:
            return change.note(action, storable(subject), model_sha256=model_sha256, detail=said)

    def entries(self, first: int = 1, limit: int | None = None) -> list[AuditEntry]:
        """Entries from number `first` on."""
        with self._access.reading() as db:
            return load_entries(db, first, limit)

    def head(self) -> tuple[int, str]:
        """Number and hash of the newest entry."""
        with self._access.reading() as db:
            return load_head(db)

    def verify(self, expected_head: str | None = None) -> int:
        """Check everything; how many entries there are. `expected_head`: a hash noted earlier, or its first 16 digits."""
        wanted = _clean_head(expected_head)
        with self._access.reading() as db:
            db.check_pages(RESTORE)  # records that agree can lie beside pages that nobody can read
            noted: dict[Key, _Noted] = {}
            count, seen = 0, False
            for entry in verify_chain(db):
                _replay(noted, entry)
                count += 1
                seen = seen or (bool(wanted) and entry.hash.startswith(wanted))
            if wanted and not seen:
                raise AuditError(
                    f"Expected an entry with the noted hash {wanted[:16]}…, found none: the log was cut or written anew.", ADVICE
                )
            _compare(db, noted)
            images = [subject for kind, subject in noted if kind == "image"]
        for image_id in images:
            self._verify_bytes(image_id, noted["image", image_id].number)
        return count

    def _verify_bytes(self, image_id: str, number: int) -> None:
        """One image at a time, so that other threads have their turn between."""
        with self._access.reading() as db:
            row = db.row("SELECT sha256, data FROM image LEFT JOIN image_data ON image_id = id WHERE id = ?", (image_id,))
        if row is not None and not is_whole(*row):  # None: deleted meanwhile
            raise AuditError(f"Entry {number} of the audit log speaks of image {image_id}, found other bytes in the store.", ADVICE)


def _clean_head(head: str | None) -> str:
    if head is None:
        return ""
    digits = "".join(head.split()).lower().rpartition(":")[2]
    if not SHORTEST_HEAD <= len(digits) <= 64 or set(digits) - set("0123456789abcdef"):
        raise InputError(
            f"Expected a noted hash of {SHORTEST_HEAD} to 64 hex digits, found {len(digits)} characters.", "See: edgemed audit show"
        )
    return digits


def _replay(noted: dict[Key, _Noted], entry: AuditEntry) -> None:
    """What the records must be after `entry`."""
    if entry.action == CASE_DELETED:
        for key in [key for key, of in noted.items() if of.case_id == entry.subject]:
            del noted[key]
    elif "record" in entry.detail:
        key = (entry.detail.get("record_kind", ""), entry.subject)
        noted[key] = _Noted(entry.number, entry.detail["record"], entry.detail.get("case", ""))


def _compare(db: Database, noted: dict[Key, _Noted]) -> None:
    """The tables against the log; the wrong record with the lowest entry is named."""
    found = _load_hashes(db)
    wrong = sorted((of.number, *key) for key, of in noted.items() if found.get(key) != of.record)
    if wrong:
        number, kind, subject = wrong[0]
        what = "a changed one" if (kind, subject) in found else "none"
        raise AuditError(f"Entry {number} of the audit log speaks of {kind} {subject}, found {what} in the store.", ADVICE)
    if extra := sorted(set(found) - set(noted)):
        raise AuditError(f"Expected an entry of the audit log for {extra[0][0]} {extra[0][1]}, found none.", ADVICE)


def _load_hashes(db: Database) -> dict[Key, str]:
    key = record_key(db)
    found: dict[Key, str] = {}
    for kind, (columns, table, id_column) in RECORDS.items():
        for row in db.rows(f"SELECT {id_column}, {columns} FROM {table}"):
            found[kind, str(row[0])] = record_hash(key, row[1:])
    return found
