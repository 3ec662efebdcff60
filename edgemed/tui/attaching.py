"""A file becomes a case's image: read, opened, compared with the case's patient, looked over for burnt-in text, and stored.

    attached = attach_file(store, case_id, path)         # in a worker thread; attached.warnings are for a person to read

What a DICOM file says of the patient goes into the case if the case knows none; a file of another patient is told, never refused: names
are typed differently on different machines. Knows no screen.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgemed.clinic.imaging import open_picture, suspect_burnt_in
from edgemed.clinic.records import CaseImage, PatientIdentity
from edgemed.clinic.store import CaseStore
from edgemed.core.errors import ImageError
from edgemed.core.files import os_errors
from edgemed.core.text import one_line

# A long ultrasound run or a whole CT in one file stays below; more is a mistake, and would not fit the memory of a small machine.
MAX_FILE_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Attached:
    """The image as stored, and what a person should know of it."""

    image: CaseImage
    warnings: tuple[str, ...] = ()
    other_patient: bool = False


def attach_file(store: CaseStore, case_id: str, path: Path) -> Attached:
    """Take a file into a case. Raises ImageError, DicomError, StoreError, ResourceError."""
    data = read_file(path)
    picture = open_picture(data, path.name)
    warnings = tuple(dict.fromkeys((*picture.facts.warnings, *suspect_burnt_in(picture))))
    known = store.load_identity(case_id)
    image = store.add_image(case_id, one_line(path.name), data, picture.facts)
    if picture.identity != PatientIdentity() and known == PatientIdentity():
        store.save_identity(case_id, picture.identity)
    return Attached(image, tuple(one_line(warning) for warning in warnings), differs(known, picture.identity))


def read_file(path: Path) -> bytes:
    """A file's bytes. Raises ImageError for what is none or too large, ResourceError."""
    with os_errors(path):
        if not path.is_file():
            raise ImageError(f"Expected an image file at {path}, found {'a folder' if path.is_dir() else 'none'}.", "Check the path.")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ImageError(f"Expected at most {MAX_FILE_BYTES} bytes in {path.name}, found {size}.", "Attach a smaller file.")
        return path.read_bytes()


def differs(known: PatientIdentity, found: PatientIdentity) -> bool:
    """Whether two identities cannot be of one person: by number if both have one, else by name and birth date."""
    if known.patient_id and found.patient_id:
        return known.patient_id != found.patient_id
    names = (_plain(known.name), _plain(found.name))
    dates = (known.birth_date, found.birth_date)
    return (all(names) and names[0] != names[1]) or (all(dates) and dates[0] != dates[1])


def _plain(name: str) -> str:
    # DICOM parts a name by ^ and pads it; people type blanks and capitals as they like.
    return " ".join(name.replace("^", " ").casefold().split())
