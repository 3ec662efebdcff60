"""A case of the store as files for others: consent, burnt-in text and the audit log's entry, the same for `chat` and `cases export`.

    wish = ExportWish(folder, ("pdf", "fhir"), with_identity=False, language="fr")
    paths = export_case(store, case_id, wish, translate=translator("fr").gettext)

Without consent who the patient is, is handed to the report as what it has to take out of every text, and a picture that may show a name
(and has no mask) is left out. With consent DICOM joins the study of the case's own file, where that file is of this patient. All of it is
for worker threads. Knows no screen and no command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL.Image import Image

from edgemed.clinic.grouping import images_to_tell
from edgemed.clinic.imaging import Picture, is_dicom, open_picture, suspect_burnt_in
from edgemed.clinic.records import CaseImage, PatientIdentity
from edgemed.clinic.report import KINDS, Export, save_export
from edgemed.clinic.report.headings import Translate, same
from edgemed.clinic.report.reference import check_same_patient, read_reference
from edgemed.clinic.store import CaseStore
from edgemed.core.errors import EdgemedError, InputError
from edgemed.core.files import found_at

OpenImage = Callable[[CaseImage], Picture]
_DICOM_KINDS = {"dicom", "sr"}


@dataclass(frozen=True)
class ExportWish:
    """Where to, as what, whether the patient may be named (consent was given), and in which language."""

    folder: Path
    kinds: tuple[str, ...]
    with_identity: bool = False
    institution: str = ""
    language: str = "en"


def check_wish(wish: ExportWish) -> None:
    """Raises InputError where it cannot be fulfilled. A folder is never made: a stick that is not plugged in must not become one."""
    unknown = [kind for kind in wish.kinds if kind not in KINDS]
    if unknown or not wish.kinds:
        found = ", ".join(map(repr, unknown)) or "none"
        raise InputError(f"Expected kinds of export among {', '.join(KINDS)}, found {found}.", "For example: --as pdf,md,fhir.")
    if not wish.folder.is_dir():
        raise InputError(f"Expected a folder at {wish.folder}, found {found_at(wish.folder)}.", "Plug the stick in, or make the folder.")


def export_case(
    store: CaseStore, case_id: str, wish: ExportWish, translate: Translate = same, open_image: OpenImage | None = None
) -> list[Path]:
    """Write the newest report's files and note that in the audit log. Raises InputError, ResourceError, StoreError, MissingExtraError."""
    check_wish(wish)
    report = store.load_report(case_id)
    if report is None:
        raise InputError("Expected a report to export, found none.", "Draft or write one first: edgemed chat.")
    images = store.list_images(case_id)
    opened = open_image or (lambda image: open_picture(store.read_image(image.id), image.name))
    messages = store.list_messages(case_id)
    shown = [_show(image, opened, wish) for image in images_to_tell(images, messages)]
    identity = store.load_identity(case_id)
    export = Export.of(
        store.load_case(case_id),
        report,
        [image for image, _ in shown],
        messages,
        identity,
        with_identity=wish.with_identity,
        institution=wish.institution,
        language=wish.language,
    )
    reference = find_reference(store, images, identity) if wish.with_identity and _DICOM_KINDS & set(wish.kinds) else None
    written = save_export(wish.folder, export, wish.kinds, [picture for _, picture in shown], reference, translate)
    _note(store, case_id, wish, written, export)
    return written


def _show(image: CaseImage, open_image: OpenImage, wish: ExportWish) -> tuple[CaseImage, Image | None]:
    """The image as it was looked at last; without consent its warnings are those of text in its pixels, which the report goes by."""
    try:
        picture = open_image(image)
        drawn: Image | None = picture.render(image.view) if {"pdf", "dicom"} & set(wish.kinds) else None
        suspected = () if wish.with_identity or drawn is None else suspect_burnt_in(picture, image.view.frame)
    except InputError:  # what can no longer be shown must not keep the report from leaving
        return image, None
    return replace(image, facts=replace(image.facts, warnings=suspected)), drawn


def find_reference(store: CaseStore, images: Sequence[CaseImage], identity: PatientIdentity) -> bytes | None:
    """The first DICOM file of the case that is of this patient and names its study."""
    for image in images:
        if image.facts.kind != "dicom" or not is_dicom(data := store.read_image(image.id)):
            continue
        try:
            check_same_patient(read_reference(data), identity)
        except InputError:  # another patient's, or one without a study: the identity's own study is joined then
            continue
        return data
    return None


def _note(store: CaseStore, case_id: str, wish: ExportWish, written: list[Path], export: Export) -> None:
    """What was not written down was not exported: without an entry the files go again."""
    report = export.report
    told = {"kinds": ",".join(wish.kinds), "identity": "yes" if wish.with_identity else "no", "version": str(report.version)}
    try:
        store.audit.append("export", case_id, report.drafted_by.sha256 if report.drafted_by else "", told)
    except EdgemedError:
        for path in written:
            path.unlink(missing_ok=True)
        raise
