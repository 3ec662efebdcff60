"""A file becomes a case's image: read, opened, compared with the case's patient, looked over for burnt-in text, and stored.

    attached = attach_file(store, case_id, path)         # in a worker thread; attached.warnings are for a person to read
    attached = attach_series(store, case_id, series, step=lambda done, total: not stopped)

A series is stored whole or not at all, in its order; files of it that cannot be shown are left out and counted. What is in the case
already, byte for byte, is not stored again: `attached.again` says so. What a DICOM file says of the patient goes into the case if the case
knows none; a file of another patient is told, never refused: names are typed differently on different machines. Knows no screen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgemed.clinic.grouping import middle_of
from edgemed.clinic.imaging import Series, open_picture, suspect_burnt_in
from edgemed.clinic.records import CaseImage, ImageFacts, PatientIdentity
from edgemed.clinic.store import CaseStore, SeriesFile
from edgemed.core.errors import ImageError, InputError
from edgemed.core.files import os_errors
from edgemed.core.text import one_line

# A long ultrasound run or a whole CT in one file stays below; more is a mistake, and would not fit the memory of a small machine.
MAX_FILE_BYTES = 2_000_000_000
Step = Callable[[int, int], bool]


@dataclass(frozen=True)
class Attached:
    """The image as stored (of a series the one to look at first), and what a person should know of it.

    `files` were stored now, `again` were in the case already (or in the folder twice), `refused` cannot be shown.
    """

    image: CaseImage
    warnings: tuple[str, ...] = ()
    other_patient: bool = False
    files: int = 1
    again: int = 0
    refused: int = 0


@dataclass(frozen=True)
class _Looked:
    """A file that was opened once and let go of."""

    path: Path
    sha256: str
    facts: ImageFacts
    identity: PatientIdentity
    warnings: tuple[str, ...]


def attach_file(store: CaseStore, case_id: str, path: Path) -> Attached:
    """Take a file into a case. Raises ImageError, DicomError, StoreError, ResourceError."""
    data = read_file(path)
    there = _in_case(store, case_id).get(hashlib.sha256(data).hexdigest())
    if there is not None:
        return Attached(there, files=0, again=1)
    looked = _look(path, data)
    known = store.load_identity(case_id)
    image = store.add_image(case_id, one_line(path.name), data, looked.facts)
    if looked.identity != PatientIdentity() and known == PatientIdentity():
        store.save_identity(case_id, looked.identity)
    return Attached(image, looked.warnings, differs(known, looked.identity))


def attach_series(store: CaseStore, case_id: str, series: Series, step: Step = lambda done, total: True) -> Attached:
    """Take the files of a series into a case, as one. `step` is told how far it is and says whether to go on.

    Every file is read twice: once to open it, once to store it, so that the store is not held up and no series needs to fit into memory.
    Raises ImageError, DicomError where no file of it can be shown, InputError where it was stopped, StoreError, ResourceError.
    """
    total = 2 * len(series.files)
    looked, refused = _look_over(series, lambda done: _go_on(step, done, total))
    there = _in_case(store, case_id)
    again = sum(one.sha256 in there for one in looked)
    if again == len(looked):
        return Attached(there[looked[(len(looked) - 1) // 2].sha256], files=0, again=again, refused=refused)
    known = store.load_identity(case_id)
    images = store.add_series(case_id, [_to_store(one, len(series.files) + n, total, step) for n, one in enumerate(looked)], series.number)
    named = next((one.identity for one in looked if one.identity != PatientIdentity()), PatientIdentity())
    if named != PatientIdentity() and known == PatientIdentity():
        store.save_identity(case_id, named)
    patient = named if known == PatientIdentity() else known
    warnings = tuple(dict.fromkeys(warning for one in looked for warning in one.warnings))
    other = any(differs(patient, one.identity) for one in looked)
    copies = len(series.files) - len(looked) - refused + series.copies
    return Attached(middle_of(tuple(images)), warnings, other, len(images), again + copies, refused)


def _in_case(store: CaseStore, case_id: str) -> dict[str, CaseImage]:
    return {image.sha256: image for image in store.list_images(case_id)}


def _look(path: Path, data: bytes) -> _Looked:
    picture = open_picture(data, path.name)
    warnings = tuple(dict.fromkeys(one_line(one) for one in (*picture.facts.warnings, *suspect_burnt_in(picture))))
    return _Looked(path, hashlib.sha256(data).hexdigest(), picture.facts, picture.identity, warnings)


def _look_over(series: Series, step: Callable[[int], None]) -> tuple[list[_Looked], int]:
    """The files that can be shown, each once, and how many cannot. Raises the first one's error where none can."""
    looked: dict[str, _Looked] = {}
    refused: list[ImageError] = []
    for done, path in enumerate(series.files):
        step(done)
        try:
            one = _look(path, read_file(path))
            looked.setdefault(one.sha256, one)
        except ImageError as error:
            refused.append(error)
    if not looked:
        raise refused[0] if refused else ImageError("Expected files in this series, found none.", "Choose another one.")
    return list(looked.values()), len(refused)


def _to_store(looked: _Looked, done: int, total: int, step: Step) -> SeriesFile:
    def read() -> bytes:
        _go_on(step, done, total)
        return read_file(looked.path)

    return SeriesFile(one_line(looked.path.name), looked.facts, looked.sha256, read)


def _go_on(step: Step, done: int, total: int) -> None:
    if not step(done, total):
        raise InputError("Expected to attach the whole series, found it stopped: nothing of it was kept.", "Attach it again when you like.")


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
