"""The report's way without its screen: drafted by the model, saved, signed, exported; each step recorded. All of it is for worker threads.

    report = draft_report(session, store, "fr")
    export_report(session, store, ExportWish(folder, ("pdf", "md"), with_identity=False))

The draft is the model's answer to a question made from the conversation; what it does not say is not invented (clinic/report/draft.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from edgemed.clinic.exporting import ExportWish as ExportWish
from edgemed.clinic.exporting import export_case
from edgemed.clinic.records import CaseImage, Message, Report
from edgemed.clinic.report import draft_question, parse_draft
from edgemed.clinic.store import CaseStore
from edgemed.core.errors import EngineError, InputError
from edgemed.tui.i18n import translator
from edgemed.tui.session import CaseSession

KINDS = ("pdf", "md", "fhir", "dicom", "sr")


def draft_report(session: CaseSession, store: CaseStore, language: str) -> Report:
    """Ask the model for a draft and save it as the case's report. Raises InputError, EngineError, StoreError."""
    messages = store.list_messages(session.case_id)
    images = _spoken_of(store.list_images(session.case_id), messages)
    question = draft_question(messages, [image.facts for image in images], language)
    answer, model = session.generate(question, images)
    if answer.finished is None:
        raise answer.error or EngineError("The draft ended without a word.", "Try again.")
    if answer.finished.reason == "cancelled":
        raise InputError("Expected the draft to be finished, found it stopped.", "Draft it again.")
    findings, impression, recommendation = parse_draft(answer.text, messages, language, translator(language).gettext)
    newest = store.load_report(session.case_id)
    return store.save_report(
        Report(session.case_id, newest.version if newest else 1, findings, impression, recommendation, drafted_by=model)
    )


def _spoken_of(images: Sequence[CaseImage], messages: Sequence[Message]) -> list[CaseImage]:
    """The images of the last question, as they were looked at then; without a question none, for nothing was asked about them."""
    by_id = {image.id: image for image in images}
    seen = next((message.images for message in reversed(messages) if message.role == "user"), ())
    return [replace(by_id[s.image_id], view=s.view) for s in seen if s.image_id in by_id]


def export_report(session: CaseSession, store: CaseStore, wish: ExportWish) -> list[Path]:
    """Write the report's files into a folder, in the wish's language. Raises InputError, ResourceError, StoreError."""
    return export_case(store, session.case_id, wish, translator(wish.language).gettext, session.picture)
