"""The images of a case: their bytes as they came, what is known about them, and how they were last looked at."""

from __future__ import annotations

import hashlib

from edgemed.clinic.records import CaseImage, ImageFacts, View
from edgemed.clinic.store.cases import mark_changed, require_case
from edgemed.clinic.store.rows import IMAGE, Row, is_whole, read_image_row, spell_record, spell_time, storable
from edgemed.clinic.store.vault import Vault
from edgemed.core.errors import InputError, StoreError

# SQLite holds a value of 1 GB at most, and a value is held in memory several times over.
MOST_IMAGE_BYTES = 512 << 20


class Images(Vault):
    """The images of a store."""

    def add_image(self, case_id: str, name: str, data: bytes, facts: ImageFacts, view: View | None = None) -> CaseImage:
        """Keep an image; durable when this returns. `name` is shown to people only."""
        if len(data) > MOST_IMAGE_BYTES:
            raise InputError(
                f"Expected an image of at most {MOST_IMAGE_BYTES >> 20} MiB, found {len(data) >> 20} MiB.", "Export fewer frames from it."
            )
        sha256 = hashlib.sha256(data).hexdigest()
        with self._access.changing() as change:
            mark_changed(change, case_id)
            image_id = self._access.means.new_id()
            row: Row = (image_id, case_id, storable(name), spell_time(change.at), sha256, len(data))
            row = (*row, spell_record(facts), spell_record(view or View()))
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


def _no_such_image(image_id: str) -> StoreError:
    return StoreError(f"Expected image {image_id} in the store, found none.", "Look it up in its case.")
