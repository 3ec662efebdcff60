"""Full-text search over labels, identities, messages and reports, by SQLite's FTS5 inside the encrypted file.

    index_text(db, case_id, "message", message_id, text)      # replaces what was indexed for it
    where, values = find_cases("amina fract")                 # for a query over the table `cases`

Letters count without accents and in any case; each word of a search may stand in another part of the case. Languages written without
spaces are found by the beginning of a run of letters only.
"""

from __future__ import annotations

from edgemed.clinic.store.database import Database
from edgemed.clinic.store.rows import storable

MOST_WORDS = 16


def index_text(db: Database, case_id: str, kind: str, subject: str, text: str) -> None:
    """Index `text` as that of one record, inside the caller's transaction."""
    row = db.row("SELECT id FROM document WHERE kind = ? AND subject = ?", (kind, subject))
    if row is None:
        db.run("INSERT INTO document (case_id, kind, subject) VALUES (?, ?, ?)", (case_id, kind, subject))
        row = db.row("SELECT id FROM document WHERE kind = ? AND subject = ?", (kind, subject))
        assert row is not None
    else:
        db.run("DELETE FROM words WHERE rowid = ?", row)
    db.run("INSERT INTO words (rowid, text) VALUES (?, ?)", (row[0], storable(text).replace("\0", " ")))


def find_cases(search: str) -> tuple[str, list[str]]:
    """A WHERE clause and its values: cases in which every word of `search` begins a word. All cases where nothing is searched."""
    words = [word for word in storable(search).replace("\0", " ").split() if any(letter.isalnum() for letter in word)]
    if not words:
        return ("WHERE 0", []) if search.strip() else ("", [])
    one = "SELECT case_id FROM document JOIN words ON words.rowid = document.id WHERE words MATCH ?"
    # Quoted, so that what was typed is never taken for FTS5's own language.
    values = ['"' + word.replace('"', '""') + '"*' for word in words[:MOST_WORDS]]
    return f"WHERE id IN ({' INTERSECT '.join([one] * len(values))})", values
