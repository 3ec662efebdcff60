"""The DICOM file that a report belongs to: its study and patient, so that the report can be filed beside it. Only with consent.

    reference = read_reference(data)
    check_same_patient(reference, identity)         # InputError where they are two people

Reads the header alone; values that cannot be read count as empty, and a file without a study is refused. What pydicom says of a file may
quote it, so none of its words are passed on.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from edgemed.clinic.records import PatientIdentity
from edgemed.clinic.report.clean import clean_line, iso_date
from edgemed.core.errors import DicomError, InputError, MissingExtraError

UID_PATTERN = re.compile(r"(?=.{1,64}\Z)[0-2](?:\.(?:0|[1-9]\d*))+")
_TAGS = {
    "study_uid": "StudyInstanceUID",
    "series_uid": "SeriesInstanceUID",
    "sop_class_uid": "SOPClassUID",
    "sop_instance_uid": "SOPInstanceUID",
    "patient_name": "PatientName",
    "patient_id": "PatientID",
    "birth_date": "PatientBirthDate",
    "sex": "PatientSex",
    "accession": "AccessionNumber",
    "study_date": "StudyDate",
    "study_time": "StudyTime",
    "study_id": "StudyID",
    "study_description": "StudyDescription",
    "referring": "ReferringPhysicianName",
    "utc_offset": "TimezoneOffsetFromUTC",
}
# What reading a file that is not as it should be can raise, in pydicom and below it.
_FOREIGN = (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError, struct.error)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_HINT = "Export without the original file, or ask for it again."


@dataclass(frozen=True)
class Reference:
    """What a report takes over from the file that it joins; empty where the file says nothing. `sha256` is the file's."""

    sha256: str
    study_uid: str
    series_uid: str = ""
    sop_class_uid: str = ""
    sop_instance_uid: str = ""
    patient_name: str = ""
    patient_id: str = ""
    birth_date: str = ""
    sex: str = ""
    accession: str = ""
    study_date: str = ""
    study_time: str = ""
    study_id: str = ""
    study_description: str = ""
    referring: str = ""
    utc_offset: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether the file itself, and not only its study, can be referred to."""
        return all(UID_PATTERN.fullmatch(uid) for uid in (self.series_uid, self.sop_class_uid, self.sop_instance_uid))


@contextmanager
def quiet() -> Iterator[None]:
    """pydicom warns and logs with the values that it meets: inside, neither reaches a log or the screen."""
    logger = logging.getLogger("pydicom")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


def read_reference(data: bytes) -> Reference:
    """The header of a DICOM file. DicomError for anything else, and for a file without a valid study."""
    try:
        import pydicom
        from pydicom.errors import BytesLengthException, InvalidDicomError
    except ImportError as error:
        raise MissingExtraError.of("Writing DICOM", "clinic") from error
    if _DEFLATED in data:
        # pydicom would inflate all of it, whatever it becomes.
        raise DicomError("Expected an original file that is not deflated, found one that may be.", _HINT)
    tags = [*_TAGS.values(), "SpecificCharacterSet"]
    foreign = (*_FOREIGN, InvalidDicomError, BytesLengthException)
    with quiet():
        try:
            dataset = pydicom.dcmread(io.BytesIO(data), stop_before_pixels=True, specific_tags=tags)
        except foreign:
            raise DicomError("Expected a DICOM file as the report's original, found something that cannot be read as one.", _HINT) from None
        found = {name: _text(dataset, keyword, foreign) for name, keyword in _TAGS.items()}
    if not UID_PATTERN.fullmatch(found["study_uid"]):
        raise DicomError("Expected the UID of a study in the original file, found none that is valid.", _HINT)
    return Reference(sha256=hashlib.sha256(data).hexdigest(), **found)


def _text(dataset: object, keyword: str, foreign: tuple[type[Exception], ...]) -> str:
    try:
        return clean_line(str(getattr(dataset, keyword, None) or ""), 400)
    except foreign:
        return ""


def check_same_patient(reference: Reference, identity: PatientIdentity) -> None:
    """Refuse to file a report into another patient's study: what both sides say of patient and study has to agree."""
    pairs = (
        ("patient ID", identity.patient_id, reference.patient_id),
        ("date of birth", iso_date(identity.birth_date), iso_date(reference.birth_date)),
        ("study", identity.study_uid, reference.study_uid),
    )
    for what, ours, theirs in pairs:
        if ours.strip() and theirs.strip() and ours.strip() != theirs.strip():
            raise _other_patient(what)
    ours_words, their_words = _name_words(identity.name), _name_words(reference.patient_name)
    if ours_words and their_words and not ours_words & their_words:
        raise _other_patient("name")


def _name_words(name: str) -> set[str]:
    return {word for word in re.split(r"[\s^,_=.]+", name.casefold()) if word}


def _other_patient(what: str) -> InputError:
    # Neither value is quoted: errors may be logged.
    return InputError(
        f"Expected an original file of the same patient and study, found another {what} in it.", "Choose the file of this case, or none."
    )
