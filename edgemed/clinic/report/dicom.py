"""What both DICOM exports share (patient, study, equipment, times, identifiers), and the PDF as an Encapsulated PDF.

    data = export_dicom_pdf(export, pdf, reference)     # the bytes of a DICOM file

With consent the file joins the study of `reference` (the original DICOM file) or of the identity; without, the reference is not even
opened, and the patient is called Withheld, with a number and a study made from the case's random id (the same for all exports of the
case, and for nothing else). All text is UTF-8 (ISO_IR 192). UIDs are made from the content (2.25 and a hash), so that the same export
is the same file and another text another instance. Times are UTC, or in the zone that the original states. An identifier that DICOM
cannot hold is refused, never cut: a cut one is another patient's.
"""

from __future__ import annotations

import hashlib
import io
import re
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

from edgemed.clinic.records import PatientIdentity
from edgemed.clinic.report.clean import clean_line, iso_date
from edgemed.clinic.report.coded import REPORT
from edgemed.clinic.report.contents import Contents, build_contents
from edgemed.clinic.report.export import Export
from edgemed.clinic.report.headings import Translate, same
from edgemed.clinic.report.reference import UID_PATTERN, Reference, check_same_patient, quiet, read_reference
from edgemed.core.errors import InputError, MissingExtraError

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

MANUFACTURER = "edgemed"
_ENCAPSULATED_PDF = "1.2.840.10008.5.1.4.1.1.104.1"
# Series numbers far from a scanner's own, one for each kind of document.
_SERIES_NUMBERS = {"pdf": 9101, "sr": 9102}
# The most characters of a value representation (PS3.5 6.2); a PN's count is for each of its groups.
_MOST_CHARS = {"SH": 16, "LO": 64, "PN": 64}


@quiet()
def export_dicom_pdf(export: Export, pdf: bytes, reference: bytes | None = None, translate: Translate = same) -> bytes:
    """An Encapsulated PDF Storage instance that holds `pdf`."""
    if not pdf.startswith(b"%PDF-"):
        raise InputError("Expected a PDF to encapsulate, found other bytes.", "Pass what export_pdf returned.")
    contents = build_contents(export, translate)
    joined = open_reference(export, reference)
    dataset = new_document(contents, joined, "pdf", _ENCAPSULATED_PDF)
    dataset.Modality = "DOC"
    dataset.ConversionType = "WSD"
    dataset.AcquisitionDateTime = ""
    dataset.BurnedInAnnotation = "NO" if contents.identity is None else "YES"
    dataset.RecognizableVisualFeatures = "NO"
    dataset.DocumentTitle = shorten(f"{contents.title} – {contents.status_text} – {contents.ai_lines[0]}", 512)
    dataset.ConceptNameCodeSequence = [_code(*REPORT)]
    dataset.VerificationFlag = "UNVERIFIED" if contents.status == "draft" else "VERIFIED"
    if joined is not None and joined.is_whole:
        dataset.SourceInstanceSequence = [sop_reference(joined)]
    dataset.MIMETypeOfEncapsulatedDocument = "application/pdf"
    dataset.EncapsulatedDocument = pdf + b"\0" * (len(pdf) % 2)
    dataset.EncapsulatedDocumentLength = len(pdf)
    return file_bytes(dataset)


def open_reference(export: Export, reference: bytes | None) -> Reference | None:
    """The study to join: the original's, or the one that the identity names; None without consent, whatever was handed in."""
    if export.identity is None:
        return None
    if reference is not None:
        joined = read_reference(reference)
        check_same_patient(joined, export.identity)
        return joined
    study_uid = export.identity.study_uid.strip()
    return Reference("", study_uid) if UID_PATTERN.fullmatch(study_uid) else None


def content_uid(*parts: str | bytes) -> str:
    """A UID made from `parts` alone: 2.25 and 128 bits of their hash, as PS3.5 B.2 makes one from a UUID."""
    digest = hashlib.sha256(b"\0".join(part.encode() if isinstance(part, str) else part for part in parts)).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def new_document(contents: Contents, joined: Reference | None, kind: str, sop_class_uid: str) -> Dataset:
    """A data set with every module but the document's own. Its SOPInstanceUID is set by `file_bytes`."""
    try:
        from pydicom.dataset import Dataset
    except ImportError as error:
        raise MissingExtraError.of("Writing DICOM", "clinic") from error
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.SOPClassUID = sop_class_uid
    _patient(dataset, contents.identity, joined, contents.reference)
    _study(dataset, contents, joined)
    dataset.SeriesInstanceUID = content_uid("series", kind, contents.reference, dataset.StudyInstanceUID)
    dataset.SeriesNumber = _SERIES_NUMBERS[kind]
    dataset.SeriesDescription = shorten(f"{contents.title} ({contents.status_text})")
    dataset.InstanceNumber = contents.version
    _equipment(dataset, contents)
    zone = _zone(joined)
    moment = contents.as_of.astimezone(zone or timezone.utc)
    dataset.ContentDate, dataset.ContentTime = moment.strftime("%Y%m%d"), moment.strftime("%H%M%S")
    if zone is not None:
        dataset.TimezoneOffsetFromUTC = moment.strftime("%z")
    return dataset


def _patient(dataset: Dataset, identity: PatientIdentity | None, joined: Reference | None, reference: str) -> None:
    if identity is None:
        dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate, dataset.PatientSex = "Withheld^", reference, "", ""
        dataset.PatientIdentityRemoved = "YES"
        dataset.DeidentificationMethod = "edgemed: exported without the patient's identity"
        return
    joined = joined or Reference("", "")
    dataset.PatientName = _fit("PN", joined.patient_name or identity.name, "name")
    dataset.PatientID = _fit("LO", joined.patient_id or identity.patient_id, "patient ID")
    dataset.PatientBirthDate = _day(joined.birth_date) or _day(identity.birth_date)
    sex = (joined.sex or identity.sex).upper()
    dataset.PatientSex = sex if sex in ("M", "F", "O") else ""


def _study(dataset: Dataset, contents: Contents, joined: Reference | None) -> None:
    accession = contents.identity.accession if contents.identity else ""
    found = joined or Reference("", content_uid("study", contents.reference))
    dataset.StudyInstanceUID = found.study_uid
    dataset.StudyDate = _day(found.study_date)
    dataset.StudyTime = found.study_time if re.fullmatch(r"(?:[01]\d|2[0-3])(?:[0-5]\d){0,2}(?:\.\d{1,6})?", found.study_time) else ""
    dataset.StudyID = "" if _misfit("SH", found.study_id) else found.study_id
    dataset.AccessionNumber = _fit("SH", found.accession or accession, "accession number")
    dataset.ReferringPhysicianName = "" if _misfit("PN", found.referring) else found.referring
    if found.study_description:
        dataset.StudyDescription = shorten(found.study_description)


def _equipment(dataset: Dataset, contents: Contents) -> None:
    from pydicom.dataset import Dataset

    dataset.Manufacturer = MANUFACTURER
    if contents.institution:
        dataset.InstitutionName = shorten(contents.institution)
    models = []
    for model in contents.models:
        item = Dataset()
        item.PurposeOfReferenceCodeSequence = [_code("109102", "Processing Equipment", "DCM")]
        item.Manufacturer = MANUFACTURER
        item.ManufacturerModelName = shorten(model.name)
        item.SoftwareVersions = shorten(model.quant)
        about = f"AI-assisted. Manifest SHA-256 {model.sha256}. It advises and never replaces a clinician."
        item.ContributionDescription = shorten(about, 1024)
        models.append(item)
    if models:
        dataset.ContributingEquipmentSequence = models


def shorten(text: str, most_bytes: int = 64) -> str:
    """Free text (never an identifier) as DICOM's LO or ST: no backslash, and short in bytes, since readers differ in what they count."""
    text = clean_line(text.replace("\\", " "), most_bytes)
    while len(text.encode()) > most_bytes:
        text = text.rstrip("…")[:-1].rstrip() + "…"
    return text


def _misfit(representation: str, text: str) -> str:
    """What keeps DICOM from holding `text` as it is, in words that do not quote it; empty where nothing does."""
    most = _MOST_CHARS[representation]
    groups = text.split("=") if representation == "PN" else [text]
    if "\\" in text:
        return "no backslash, found one"
    if len(groups) > 3:
        return f"at most 3 groups (=), found {len(groups)}"
    longest = max(map(len, groups))
    return f"at most {most} characters, found {longest}" if longest > most else ""


def _fit(representation: str, text: str, what: str) -> str:
    """`text` where DICOM can hold it as it is, otherwise InputError (without quoting it)."""
    if misfit := _misfit(representation, text.strip()):
        raise InputError(f"Expected the {what} for DICOM with {misfit}.", "Correct it in the case's identity, or export another format.")
    return text.strip()


def _day(text: str) -> str:
    return iso_date(text).replace("-", "")


def _zone(joined: Reference | None) -> timezone | None:
    """UTC for a study of our own; the original's zone where it states one; otherwise unknown, as its other times are."""
    if joined is None or not joined.sha256:
        return timezone.utc
    match = re.fullmatch(r"([+-])(\d\d)([0-5]\d)", joined.utc_offset)
    if not match or int(match[2]) > 14:
        return None
    return timezone((-1 if match[1] == "-" else 1) * timedelta(hours=int(match[2]), minutes=int(match[3])))


def _code(value: str, meaning: str, scheme: str = "LN") -> Dataset:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, scheme, meaning
    return item


def sop_reference(joined: Reference) -> Dataset:
    """An item that refers to the original file."""
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = joined.sop_class_uid, joined.sop_instance_uid
    return item


def date_time(moment: datetime) -> str:
    """DICOM's DT in UTC, with its offset."""
    return moment.astimezone(timezone.utc).strftime("%Y%m%d%H%M%S+0000")


def file_bytes(dataset: Dataset) -> bytes:
    """The data set as a file (Explicit VR Little Endian), its instance UID made from everything else in it."""
    dataset.SOPInstanceUID = "2.25.0"
    dataset.SOPInstanceUID = content_uid("instance", _encode(dataset))
    return _encode(dataset)


def _encode(dataset: Dataset) -> bytes:
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.file_meta = meta
    buffer = io.BytesIO()
    try:
        dataset.save_as(buffer, enforce_file_format=True)
    except (ValueError, TypeError, OverflowError) as error:
        # Its words quote the value.
        raise InputError("Expected values that DICOM can hold, found one that it cannot.", "Shorten the identity's fields.") from error
    return buffer.getvalue()
