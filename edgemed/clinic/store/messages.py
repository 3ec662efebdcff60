"""The conversation of a case: turns are added and never changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from edgemed.clinic.records import Confidence, Message, MessageState, ModelIdentity, SeenImage, Verdict
from edgemed.clinic.store.cases import mark_changed, require_case
from edgemed.clinic.store.rows import MESSAGE, message_row, read_message, storable
from edgemed.clinic.store.search import index_text
from edgemed.clinic.store.vault import Vault


class Messages(Vault):
    """The messages of a store."""

    def add_message(
        self,
        case_id: str,
        role: Literal["user", "assistant"],
        text: str,
        images: Sequence[SeenImage] = (),
        model: ModelIdentity | None = None,
        state: MessageState = "complete",
        confidence: Confidence | None = None,
        verdict: Verdict = "answer",
    ) -> Message:
        """Keep a turn; durable when this returns."""
        with self._access.changing() as change:
            mark_changed(change, case_id)
            message = Message(
                self._access.means.new_id(), case_id, role, storable(text), change.at, tuple(images), model, state, confidence, verdict
            )
            change.db.run(f"INSERT INTO message ({MESSAGE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", message_row(message))
            index_text(change.db, case_id, "message", message.id, text)
            sha256 = model.sha256 if model else ""
            change.note("message.added", message.id, kind="message", case_id=case_id, model_sha256=sha256, detail={"role": role})
        return message

    def list_messages(self, case_id: str) -> list[Message]:
        """A case's messages in order."""
        with self._access.reading() as db:
            require_case(db, case_id)
            rows = db.rows(f"SELECT {MESSAGE} FROM message WHERE case_id = ? ORDER BY place", (case_id,))
        return [read_message(row) for row in rows]
