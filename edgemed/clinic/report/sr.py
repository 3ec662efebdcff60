"""The report as a DICOM Basic Text SR, after PS3.16's template 2000 (basic diagnostic imaging report); its tree is highdicom's.

    data = export_dicom_sr(export, reference)

A draft is PARTIAL, PRELIMINARY and UNVERIFIED; a signed report COMPLETE, FINAL and VERIFIED by its signer. Beside the three sections the
document tells which models took part and which views they were given. Patient and study: see dicom.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemed.clinic.records import ModelIdentity
from edgemed.clinic.report.coded import LANGUAGES, SECTION_CONTAINERS, SECTION_TEXTS
from edgemed.clinic.report.contents import Contents, Say, Turn, build_contents, say_in, seen_text
from edgemed.clinic.report.dicom import content_uid, date_time, file_bytes, new_document, open_reference, shorten, sop_reference
from edgemed.clinic.report.export import Export
from edgemed.clinic.report.headings import Translate, same
from edgemed.clinic.report.reference import Reference, quiet
from edgemed.core.errors import MissingExtraError

if TYPE_CHECKING:
    from highdicom.sr import CodedConcept, ContainerContentItem, ContentItem
    from pydicom.dataset import Dataset

_BASIC_TEXT_SR = "1.2.840.10008.5.1.4.1.1.88.11"
# Concepts that DICOM has no code for; a reader that does not know the scheme shows their meanings.
_SCHEME = "99EDGEMED"
_COMPLETION = {"draft": ("PARTIAL", "PRELIMINARY"), "signed": ("COMPLETE", "FINAL"), "amended": ("COMPLETE", "FINAL")}


@quiet()
def export_dicom_sr(export: Export, reference: bytes | None = None, translate: Translate = same) -> bytes:
    """A Basic Text SR instance of the whole report."""
    contents = build_contents(export, translate)
    joined = open_reference(export, reference)
    dataset = new_document(contents, joined, "sr", _BASIC_TEXT_SR)
    dataset.Modality = "SR"
    dataset.ReferencedPerformedProcedureStepSequence = []
    dataset.PerformedProcedureCodeSequence = []
    dataset.CompletionFlag, dataset.PreliminaryFlag = _COMPLETION[contents.status]
    dataset.CompletionFlagDescription = shorten(contents.status_text)
    _verify(dataset, contents)
    original = _original(export, joined)
    try:
        tree = _tree(contents, original, say_in(export, translate))
    except ImportError as error:
        raise MissingExtraError.of("Writing a DICOM structured report", "clinic") from error
    for element in tree:
        dataset.add(element)
    dataset.CodingSchemeIdentificationSequence = [_scheme()]
    if original is not None:
        dataset.CurrentRequestedProcedureEvidenceSequence = [_evidence(original)]
    return file_bytes(dataset)


def _verify(dataset: Dataset, contents: Contents) -> None:
    from pydicom.dataset import Dataset

    if contents.signed_at is None:
        dataset.VerificationFlag = "UNVERIFIED"
        return
    item = Dataset()
    item.VerifyingObserverName = _person_name(contents.signed_by)
    item.VerifyingObserverIdentificationCodeSequence = []
    item.VerifyingOrganization = shorten(contents.institution) or "Not stated"
    item.VerificationDateTime = date_time(contents.signed_at)
    dataset.VerificationFlag = "VERIFIED"
    dataset.VerifyingObserverSequence = [item]


def _person_name(name: str) -> str:
    """A name as it was typed, as DICOM's PN: all of it in the first component, since nothing says which word is which."""
    return shorten(name.replace("^", " ").replace("=", " "), 63) + "^"


def _original(export: Export, joined: Reference | None) -> Reference | None:
    """The original where it is one of the case's images (by its hash) and names itself whole."""
    if joined is None or not joined.is_whole or joined.sha256 not in {image.sha256 for image in export.images}:
        return None
    return joined


def _evidence(original: Reference) -> Dataset:
    from pydicom.dataset import Dataset

    series, study = Dataset(), Dataset()
    series.SeriesInstanceUID = original.series_uid
    series.ReferencedSOPSequence = [sop_reference(original)]
    study.StudyInstanceUID = original.study_uid
    study.ReferencedSeriesSequence = [series]
    return study


def _scheme() -> Dataset:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodingSchemeDesignator, item.CodingSchemeName, item.CodingSchemeResponsibleOrganization = _SCHEME, "edgemed report", "edgemed"
    return item


def _concept(value: str, meaning: str, scheme: str = "DCM") -> CodedConcept:
    from highdicom.sr import CodedConcept

    return CodedConcept(value, scheme, shorten(meaning))


def _container(name: CodedConcept, items: list[ContentItem], template: str | None = None, root: bool = False) -> ContainerContentItem:
    from highdicom.sr import ContainerContentItem, ContentSequence

    container = ContainerContentItem(name, False, template, None if root else "CONTAINS")
    container.ContentSequence = ContentSequence(items)
    return container


def _text(name: CodedConcept, value: str) -> ContentItem:
    from highdicom.sr import TextContentItem

    # UT's line break is CR LF (PS3.5 6.1.3); empty text is not allowed.
    return TextContentItem(name, value.replace("\n", "\r\n").strip() or "–", "CONTAINS")


def _tree(contents: Contents, original: Reference | None, say: Say) -> ContainerContentItem:
    from highdicom.sr import LanguageOfContentItemAndDescendants

    language = contents.language
    known = language if language in LANGUAGES else "en"
    items: list[ContentItem] = [*LanguageOfContentItemAndDescendants(_concept(known, LANGUAGES[known], "RFC5646"))]
    items += _observers(contents)
    for section in contents.sections:
        text = _text(_concept(*SECTION_TEXTS[section.key]), section.text)
        items.append(_container(_concept(*SECTION_CONTAINERS[section.key]), [text]))
    assistance = [_text(_concept("ai", "AI assistance", _SCHEME), line) for line in contents.ai_lines]
    items.append(_container(_concept("ai", "AI assistance", _SCHEME), assistance))
    if contents.turns:
        turns = [item for turn in contents.turns for item in _turn(turn, say)]
        items.append(_container(_concept("conversation", "Conversation with the model", _SCHEME), turns))
    if original is not None:
        items.append(_container(_concept("images", "Images shown to the model", _SCHEME), [_image(original)]))
    return _container(_concept("18748-4", "Diagnostic Imaging Report", "LN"), items, "2000", root=True)


def _observers(contents: Contents) -> list[ContentItem]:
    """Who observed: the signer as a person, or for a draft nobody but the devices."""
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObserverContext, PersonObserverIdentifyingAttributes

    contexts: list[ObserverContext] = []
    if contents.signed_by:
        organization = contents.institution or None
        person = PersonObserverIdentifyingAttributes(_person_name(contents.signed_by), organization_name=organization)
        contexts.append(ObserverContext(_concept("121006", "Person"), person))
    for model in contents.models:
        about = (model.name or None, "edgemed", model.quant or None, model.sha256 or None)
        device = DeviceObserverIdentifyingAttributes(_device_uid(model), *about)
        contexts.append(ObserverContext(_concept("121007", "Device"), device))
    return [item for context in contexts for item in context]


def _device_uid(model: ModelIdentity) -> str:
    return content_uid("model", model.name, model.quant, model.sha256)


def _turn(turn: Turn, say: Say) -> list[ContentItem]:
    key = "question" if turn.role == "user" else "answer"
    items = [_text(_concept(key, key.capitalize(), _SCHEME), turn.text)]
    seen = [seen_text(one, say) for one in turn.seen]
    items += [_text(_concept("view", "View that produced the answer", _SCHEME), line) for line in seen]
    if turn.model is not None:
        model = f"{turn.model.name} ({turn.model.quant}), {turn.model.sha256}"
        items.append(_text(_concept("model", "Model that answered", _SCHEME), model))
    return items + [_text(_concept("note", "Note", _SCHEME), note) for note in turn.notes]


def _image(original: Reference) -> ContentItem:
    from highdicom.sr import ImageContentItem

    name = _concept("image", "Image shown to the model", _SCHEME)
    return ImageContentItem(name, original.sop_class_uid, original.sop_instance_uid, relationship_type="CONTAINS")
