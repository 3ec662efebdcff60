"""The report's way without its screen: drafted by the model, saved, signed, exported; each step recorded. All of it is for worker threads.

    report = draft_report(session, store, "fr")
    export_report(session, store, ExportWish(folder, ("pdf", "md"), with_identity=False))

The draft is the model's answer to a question made from the conversation; what it does not say is not invented (clinic/report/draft.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL.Image import Image

from edgemed.clinic.imaging import is_dicom
from edgemed.clinic.records import CaseImage, Message, Report
from edgemed.clinic.report import Export, draft_question, parse_draft, save_export
from edgemed.clinic.store import CaseStore
from edgemed.core.errors import EngineError, InputError
from edgemed.tui.i18n import translator
from edgemed.tui.session import CaseSession

KINDS = ("pdf", "md", "fhir", "dicom", "sr")


@dataclass(frozen=True)
class ExportWish:
    """Where to, as what, and whether the patient may be named."""

    folder: Path
    kinds: tuple[str, ...]
    with_identity: bool = False
    institution: str = ""


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
    return store.save_report(
        Report(session.case_id, findings=findings, impression=impression, recommendation=recommendation, drafted_by=model)
    )


def _spoken_of(images: Sequence[CaseImage], messages: Sequence[Message]) -> list[CaseImage]:
    """The images of the last question, as they were looked at then; without a question none, for nothing was asked about them."""
    by_id = {image.id: image for image in images}
    seen = next((message.images for message in reversed(messages) if message.role == "user"), ())
    return [by_id[s.image_id] for s in seen if s.image_id in by_id]


def export_report(session: CaseSession, store: CaseStore, wish: ExportWish, language: str = "en") -> list[Path]:
    """Write the report's files into a folder. Raises InputError, ResourceError, StoreError."""
    case = store.load_case(session.case_id)
    report = store.load_report(session.case_id)
    if report is None:
        raise InputError("Expected a report to export, found none.", "Draft or write one first.")
    images = tuple(store.list_images(case.id))
    export = Export(
        case=case,
        report=report,
        images=images,
        messages=tuple(store.list_messages(case.id)),
        identity=store.load_identity(case.id) if wish.with_identity else None,
        institution=wish.institution,
    )
    pictures: list[Image | None] = [session.picture(image).render(image.view) for image in images]
    written = save_export(wish.folder, export, wish.kinds, pictures, translate=translator(language).gettext)
    told = {"kinds": ",".join(wish.kinds), "identity": "yes" if wish.with_identity else "no", "version": str(report.version)}
    store.audit.append("export", case.id, report.drafted_by.sha256 if report.drafted_by else "", told)
    return written


def reference_of(store: CaseStore, images: Sequence[CaseImage]) -> bytes | None:
    """The first DICOM file of a case, whose study an export may join."""
    for image in images:
        if image.facts.kind == "dicom" and is_dicom(data := store.read_image(image.id)):
            return data
    return None
