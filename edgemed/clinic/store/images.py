"""The images of a case: their bytes as they came, what is known about them, and how they were last looked at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from edgemed.clinic.records import CaseImage, ImageFacts, SeriesPlace, View
from edgemed.clinic.store.access import Change
from edgemed.clinic.store.cases import mark_changed, require_case
from edgemed.clinic.store.rows import IMAGE, Row, is_whole, read_image_row, spell_record, spell_time, storable
from edgemed.clinic.store.vault import Vault
from edgemed.core.errors import InputError, StoreError

# SQLite holds a value of 1 GB at most, and a value is held in memory several times over.
MOST_IMAGE_BYTES = 512 << 20


@dataclass(frozen=True)
class SeriesFile:
    """A file of a series before it is kept: what is known of it, the hash of its bytes, and how to read them (once)."""

    name: str
    facts: ImageFacts
    sha256: str
    read: Callable[[], bytes]


class Images(Vault):
    """The images of a store."""

    def add_image(self, case_id: str, name: str, data: bytes, facts: ImageFacts, view: View | None = None) -> CaseImage:
        """Keep an image; durable when this returns. `name` is shown to people only."""
        _require_small(data)
        with self._access.changing() as change:
            mark_changed(change, case_id)
            return self._insert(change, case_id, name, data, facts, view or View())

    def add_series(self, case_id: str, files: Sequence[SeriesFile], number: int = 0) -> list[CaseImage]:
        """Keep the files of a series in their order, all of them or none; durable when this returns.

        They are read one after the other; what a `read` raises ends it, and InputError says where one's bytes are not those of its hash.
        """
        added = []
        with self._access.changing() as change:
            mark_changed(change, case_id)
            series_id = self._access.means.new_id()
            for place, file in enumerate(files, 1):
                data = file.read()
                _require_small(data)
                if hashlib.sha256(data).hexdigest() != file.sha256:
                    raise InputError(f"Expected {file.name} as it was a moment ago, found other bytes.", "Attach the series again.")
                facts = replace(file.facts, series=SeriesPlace(series_id, place, len(files), number))
                added.append(self._insert(change, case_id, file.name, data, facts, View()))
        return added

    def _insert(self, change: Change, case_id: str, name: str, data: bytes, facts: ImageFacts, view: View) -> CaseImage:
        sha256 = hashlib.sha256(data).hexdigest()
        image_id = self._access.means.new_id()
        row: Row = (image_id, case_id, storable(name), spell_time(change.at), sha256, len(data), spell_record(facts), spell_record(view))
        change.db.run(f"INSERT INTO image ({IMAGE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        change.db.run("INSERT INTO image_data (image_id, data) VALUES (?, ?)", (image_id, data))
        change.note("image.added", image_id, kind="image", case_id=case_id, detail={"sha256": sha256})
        return read_image_row(row)

    def list_images(self, case_id: str) -> list[CaseImage]:
        """A case's images in the order in which they came."""
        with self._access.reading() as db:
            require_case(db, case_id)
            rows = db.rows(f"SELECT {IMAGE} FROM image WHERE case_id = ? ORDER BY place", (case_id,))
        return [read_image_row(row) for row in rows]

    def read_image(self, image_id: str) -> bytes:
        """An image's bytes. StoreError where they are not those that came."""
        with self._access.reading() as db:
            row = db.row("SELECT sha256, data FROM image JOIN image_data ON image_id = id WHERE id = ?", (image_id,))
        if row is None:
            raise _no_such_image(image_id)
        if not is_whole(*row):
            raise StoreError(f"Expected the bytes that were added as image {image_id}, found others.", "Check with: edgemed audit verify")
        return bytes(row[1])

    def save_view(self, image_id: str, view: View) -> None:
        """Remember how an image is looked at. The same view again is no change."""
        with self._access.reading() as db:
            found = db.row("SELECT case_id, view FROM image WHERE id = ?", (image_id,))
            if found is None:
                raise _no_such_image(image_id)
            if found[1] == spell_record(view):
                return
            with self._access.changing() as change:
                change.db.run("UPDATE image SET view = ? WHERE id = ?", (spell_record(view), image_id))
                change.note("image.viewed", image_id, kind="image", case_id=found[0])


def _require_small(data: bytes) -> None:
    if len(data) > MOST_IMAGE_BYTES:
        raise InputError(
            f"Expected an image of at most {MOST_IMAGE_BYTES >> 20} MiB, found {len(data) >> 20} MiB.", "Export fewer frames from it."
        )


def _no_such_image(image_id: str) -> StoreError:
    return StoreError(f"Expected image {image_id} in the store, found none.", "Look it up in its case.")
