"""What is handed to every exporter: the case's frozen records, whether its identity may be told, and what follows from the records alone.

    export = Export.of(case, report, images, messages, identity, with_identity=False)
    status_of(export.report)                    # "draft"

Knows no format and no words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgemed.clinic.records import Case, CaseImage, Message, PatientIdentity, Report

Status = Literal["draft", "signed", "amended"]


@dataclass(frozen=True)
class Export:
    """Everything an export needs. `identity` None: no consent. `withheld`: what to take out of texts then (the identity that is known).

    Without consent the picture of an image that has warnings and no mask is left out of the PDF: its pixels may show who it is. Whoever
    knows of text in other pictures (imaging's suspect_burnt_in) hands in None for them.
    """

    case: Case
    report: Report
    images: tuple[CaseImage, ...]
    messages: tuple[Message, ...]
    identity: PatientIdentity | None
    institution: str = ""
    language: str = "en"
    withheld: PatientIdentity | None = None

    @classmethod
    def of(
        cls,
        case: Case,
        report: Report,
        images: Sequence[CaseImage],
        messages: Sequence[Message],
        identity: PatientIdentity,
        *,
        with_identity: bool,
        institution: str = "",
        language: str = "en",
    ) -> Export:
        """The export of a case whose identity is known, told where `with_identity` (consent was given), withheld otherwise."""
        told, withheld = (identity, None) if with_identity else (None, identity)
        return cls(case, report, tuple(images), tuple(messages), told, institution, language, withheld)


def case_reference(case_id: str) -> str:
    """A short name for the case that tells nothing of it: made from its random id."""
    return hashlib.sha256(f"edgemed report {case_id}".encode()).hexdigest()[:12]


def status_of(report: Report) -> Status:
    """A report without a signature is a draft; a signed one after the first version amends an earlier one."""
    if not report.signed_by.strip() or report.signed_at is None:
        return "draft"
    return "amended" if report.version > 1 else "signed"
