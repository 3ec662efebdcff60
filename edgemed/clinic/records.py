"""What the store, the imaging, the reports and the screens hand one another: frozen values, no behaviour beyond their own checks.

Times are aware datetimes in UTC, ids are 32 hex digits. Text is kept as it was typed or generated; whoever shows it makes it safe for
a terminal (core.text). Knows neither SQLite nor DICOM nor Textual.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from edgemed.core.identity import ModelIdentity as ModelIdentity

Verdict = Literal["answer", "refer"]
MessageState = Literal["complete", "stopped", "failed"]
WindowFunction = Literal["linear", "linear_exact", "sigmoid"]


@dataclass(frozen=True)
class Window:
    """A VOI window in the image's own units (after the modality LUT), as DICOM PS3.3 C.11.2 defines it."""

    centre: float
    width: float
    function: WindowFunction = "linear"
    name: str = ""


@dataclass(frozen=True)
class Box:
    """A rectangle in the image's own pixels; right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class View:
    """How an image was looked at, by the person and by the model alike: kept with every answer. window None: the file's own."""

    frame: int = 0
    window: Window | None = None
    invert: bool = False
    masks: tuple[Box, ...] = ()


@dataclass(frozen=True)
class PatientIdentity:
    """Who the patient is, as the clinician or a DICOM file says. Never given to the model, the log, or an export without consent.

    `birth_date` is ISO 8601 (YYYY-MM-DD) or empty; `sex` is DICOM's M, F, O or empty.
    """

    name: str = ""
    patient_id: str = ""
    birth_date: str = ""
    sex: str = ""
    accession: str = ""
    study_uid: str = ""


@dataclass(frozen=True)
class SeriesPlace:
    """An image's place among those that were attached as one series. `id` is the store's own, no uid of the study; `place` is from 1.

    `number` is the series' number in its study, 0 where the files do not say.
    """

    id: str
    place: int
    length: int
    number: int = 0


@dataclass(frozen=True)
class ImageFacts:
    """What an image file says that identifies nobody. Uids are the study's own and stay in the store unless export is consented to.

    `series` is not the file's word but the store's: None for an image that was attached by itself.
    """

    kind: Literal["dicom", "plain"]
    width_px: int
    height_px: int
    frames: int = 1
    modality: str = ""
    body_part: str = ""
    view_position: str = ""
    laterality: str = ""
    description: str = ""
    warnings: tuple[str, ...] = ()
    series: SeriesPlace | None = None


@dataclass(frozen=True)
class CaseImage:
    """An image in a case. Its bytes are read apart (CaseStore.read_image). `sha256` is the file's as it came."""

    id: str
    case_id: str
    name: str
    added: datetime
    sha256: str
    size_bytes: int
    facts: ImageFacts
    view: View = View()


@dataclass(frozen=True)
class SeenImage:
    """An image as it was shown to the model: which, how, and the SHA-256 of the very pixels that the tower was given."""

    image_id: str
    view: View
    pixels_sha256: str


@dataclass(frozen=True)
class Confidence:
    """How sure an answer is: the calibrated probability that it is right, where `edgemed eval` left a calibration for this model."""

    probability: float
    calibrated_on: str


@dataclass(frozen=True)
class Message:
    """One turn. An assistant's has the model, the state in which it ended and, where there is a calibration, how sure it is."""

    id: str
    case_id: str
    role: Literal["user", "assistant"]
    text: str
    created: datetime
    images: tuple[SeenImage, ...] = ()
    model: ModelIdentity | None = None
    state: MessageState = "complete"
    confidence: Confidence | None = None
    verdict: Verdict = "answer"


@dataclass(frozen=True)
class Report:
    """The case's report. Drafted by a model (`drafted_by`), edited, and once `signed_by` is set, never changed: a new version follows."""

    case_id: str
    version: int = 1
    findings: str = ""
    impression: str = ""
    recommendation: str = ""
    drafted_by: ModelIdentity | None = None
    edited: bool = False
    signed_by: str = ""
    signed_at: datetime | None = None


@dataclass(frozen=True)
class Case:
    """A case as the list shows it. `label` is the clinician's own short name for it, not the patient's."""

    id: str
    label: str
    created: datetime
    changed: datetime
    images: int = 0
    messages: int = 0
    signed: bool = False


@dataclass(frozen=True)
class AuditEntry:
    """One line of the audit log. `hash` chains it to all before: see store/audit.py. Never holds what was asked, answered or seen."""

    number: int
    at: datetime
    actor: str
    action: str
    subject: str = ""
    model_sha256: str = ""
    detail: dict[str, str] = field(default_factory=dict)
    hash: str = ""
