"""Between the frozen values of clinic/records.py and the columns of the tables. StoreError where a column does not hold what it should.

Times are ISO 8601 in UTC with microseconds; nested values are JSON, an absent one is empty. Knows no SQL.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any, TypeVar

from edgemed.clinic.records import (
    Box,
    Case,
    CaseImage,
    Confidence,
    ImageFacts,
    Message,
    ModelIdentity,
    PatientIdentity,
    Report,
    SeenImage,
    SeriesPlace,
    View,
    Window,
)
from edgemed.core.errors import StoreError

T = TypeVar("T")
Row = tuple[Any, ...]

CASE = "id, label, created, changed"
IDENTITY = "name, patient_id, birth_date, sex, accession, study_uid"
IMAGE = "id, case_id, name, added, sha256, size_bytes, facts, view"
MESSAGE = "id, case_id, role, text, created, images, model, state, confidence, verdict"
REPORT = "case_id, version, findings, impression, recommendation, drafted_by, edited, signed_by, signed_at"


def storable(text: str) -> str:
    """`text` as Unicode that can be stored: the odd bytes of a path are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode()


def spell_time(moment: datetime) -> str:
    """A time in UTC, in one spelling that also sorts."""
    return moment.astimezone(timezone.utc).isoformat(timespec="microseconds")


def read_time(text: str) -> datetime:
    """A time as `spell_time` wrote it."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError("a time without a zone")
    return moment


def spell(value: Any) -> str:
    """JSON in one spelling: sorted keys, no spaces, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def spell_record(value: Any) -> str:
    """A dataclass as JSON, None as nothing."""
    return "" if value is None else spell(asdict(value))


def spell_records(values: tuple[Any, ...]) -> str:
    """Several dataclasses as JSON."""
    return spell([asdict(v) for v in values])


def is_whole(sha256: object, data: object) -> bool:
    """Whether `data` is what was added. It may be anything in a store that was changed."""
    return isinstance(data, bytes) and hashlib.sha256(data).hexdigest() == sha256


@contextmanager
def reading(what: str) -> Iterator[None]:
    """A column that holds something else is a damaged record, said without its content."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(
            f"Expected a whole {what} in the case store, found a damaged one.", "Check it with: edgemed audit verify"
        ) from error


def _optional(read: Callable[[Any], T], text: str) -> T | None:
    return read(json.loads(text)) if text else None


def _view(raw: dict[str, Any]) -> View:
    window = None if raw["window"] is None else Window(**raw["window"])
    return View(raw["frame"], window, raw["invert"], tuple(Box(**box) for box in raw["masks"]))


def _facts(raw: dict[str, Any]) -> ImageFacts:
    # Stores that were written before there were series do not say.
    series = SeriesPlace(**raw["series"]) if raw.get("series") else None
    return ImageFacts(**(raw | {"warnings": tuple(raw["warnings"]), "series": series}))


def _seen(raw: dict[str, Any]) -> SeenImage:
    return SeenImage(raw["image_id"], _view(raw["view"]), raw["pixels_sha256"])


def read_case(row: Row) -> Case:
    """A row of CASE, then how many images and messages, and whether the newest report is signed."""
    with reading("case"):
        case_id, label, created, changed, images, messages, signed = row
        return Case(case_id, label, read_time(created), read_time(changed), images, messages, bool(signed))


def read_identity(row: Row) -> PatientIdentity:
    """A row of IDENTITY."""
    with reading("identity"):
        return PatientIdentity(*row)


def read_image_row(row: Row) -> CaseImage:
    """A row of IMAGE."""
    with reading("image"):
        image_id, case_id, name, added, sha256, size_bytes, facts, view = row
        return CaseImage(image_id, case_id, name, read_time(added), sha256, size_bytes, _facts(json.loads(facts)), _view(json.loads(view)))


def read_message(row: Row) -> Message:
    """A row of MESSAGE."""
    with reading("message"):
        message_id, case_id, role, text, created, images, model, state, confidence, verdict = row
        return Message(
            message_id,
            case_id,
            role,
            text,
            read_time(created),
            tuple(_seen(raw) for raw in json.loads(images)),
            _optional(lambda raw: ModelIdentity(**raw), model),
            state,
            _optional(lambda raw: Confidence(**raw), confidence),
            verdict,
        )


def message_row(message: Message) -> Row:
    """The values of MESSAGE."""
    return (
        message.id,
        message.case_id,
        message.role,
        message.text,
        spell_time(message.created),
        spell_records(message.images),
        spell_record(message.model),
        message.state,
        spell_record(message.confidence),
        message.verdict,
    )


def read_report(row: Row) -> Report:
    """A row of REPORT."""
    with reading("report"):
        case_id, version, findings, impression, recommendation, drafted_by, edited, signed_by, signed_at = row
        model = _optional(lambda raw: ModelIdentity(**raw), drafted_by)
        when = read_time(signed_at) if signed_at else None
        return Report(case_id, version, findings, impression, recommendation, model, bool(edited), signed_by, when)


def report_row(report: Report) -> Row:
    """The values of REPORT."""
    return (
        report.case_id,
        report.version,
        report.findings,
        report.impression,
        report.recommendation,
        spell_record(report.drafted_by),
        int(report.edited),
        report.signed_by,
        spell_time(report.signed_at) if report.signed_at else "",
    )
