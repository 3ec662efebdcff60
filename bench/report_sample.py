"""A small case for the report's check and its tests: two images, three questions, two models; and identifiers that can be searched for.

    export = sample_export(identity=None)         # without consent; PLANTED is what must not be found then

Everything is invented. The picture is drawn, not taken.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone

import numpy as np
from PIL import Image

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
    View,
    Window,
)
from edgemed.clinic.report import Export

START = datetime(2026, 3, 4, 9, 30, tzinfo=timezone.utc)
CASE_ID = "5f2b8a7e3c1d4f60a9b8c7d6e5f40312"
IDENTITY = PatientIdentity("OKONKWO^ADAEZE^M", "PID-7741-XQ", "1958-11-23", "F", "ACC90417733", "1.2.826.0.1.3680043.8.498.77411958112300417733")
FILE_NAMES = ("OKONKWO_ADAEZE_19581123_wrist.dcm", "Adaeze Okonkwo CT.dcm")
LABEL = "Adaeze, bed 14"
# What must be in no byte of an export without consent.
PLANTED = (
    "OKONKWO",
    "ADAEZE",
    "PID-7741-XQ",
    "1958-11-23",
    "19581123",
    "23.11.1958",
    "ACC90417733",
    "77411958112300417733",
    "bed 14",
    *FILE_NAMES,
)
DRAFTER = ModelIdentity("edgemed-demo", "Q4_K_M", "a" * 64)
OTHER = ModelIdentity("llava-med-v1.5", "Q8_0", "b" * 64)
_WRIST = View(invert=True, masks=(Box(0, 0, 60, 20),))
_CT = View(frame=4, window=Window(40, 400, "linear", "MEDIASTINUM"))


def sample_images() -> tuple[CaseImage, ...]:
    """A radiograph and a CT of ten frames."""
    wrist = ImageFacts("dicom", 320, 240, 1, "DX", "WRIST", "PA", "L", "", ("The image may carry burnt-in text.",))
    ct = ImageFacts("dicom", 256, 256, 10, "CT", "CHEST")
    return (
        CaseImage("1" * 32, CASE_ID, FILE_NAMES[0], START, "c" * 64, 90_000, wrist, _WRIST),
        CaseImage("2" * 32, CASE_ID, FILE_NAMES[1], START, "d" * 64, 70_000, ct, _CT),
    )


def sample_messages() -> tuple[Message, ...]:
    """Three questions; the last one is referred to a clinician, and the second answer was stopped."""
    seen_wrist, seen_ct = SeenImage("1" * 32, _WRIST, "e" * 64), SeenImage("2" * 32, _CT, "f" * 64)
    turns = [
        ("user", "Is there a fracture of the wrist?", (), None, {}),
        ("assistant", "Yes, a fracture of the distal radius.", (seen_wrist,), DRAFTER, {"confidence": Confidence(0.83, "SLAKE test")}),
        ("user", "Ms Okonkwo, born 23.11.1958, also coughs. Anything in the chest?", (), None, {}),
        ("assistant", "No focal consolidation is", (seen_ct,), OTHER, {"state": "stopped"}),
        ("user", "Is the nodule malignant?", (), None, {}),
        ("assistant", "I am not sure.", (seen_ct,), DRAFTER, {"verdict": "refer"}),
    ]
    return tuple(
        Message(f"{number:032x}", CASE_ID, role, text, START + timedelta(minutes=number), images, model, **more)  # type: ignore[arg-type]
        for number, (role, text, images, model, more) in enumerate(turns, 1)
    )


def sample_report(signed: bool = True, version: int = 1) -> Report:
    """Findings, impression and recommendation, signed or not. Text with accents, symbols and several lines."""
    report = Report(
        CASE_ID,
        version,
        "Transverse fracture of the distal radius, dorsal angulation ≈ 15°.\nNo dislocation. Soft tissues swollen.\nOKONKWO ADAEZE (PID-7741-XQ).",
        "Fracture of the distal left radius (Colles).",
        "Reduction and cast; control after 7 days. Réévaluer l’œdème – mão e punho.",
        DRAFTER,
        edited=True,
    )
    return replace(report, signed_by="Dr. Amélie Nkemelu", signed_at=START + timedelta(hours=1)) if signed else report


def sample_export(identity: PatientIdentity | None = IDENTITY, signed: bool = True, version: int = 1) -> Export:
    """The case, with consent where an identity is given; without, it is known to the export as `withheld`."""
    case = Case(CASE_ID, LABEL, START, START + timedelta(minutes=50), 2, 6, signed)
    withheld = IDENTITY if identity is None else None
    report = sample_report(signed, version)
    return Export(case, report, sample_images(), sample_messages(), identity, "Clinique Espérance", withheld=withheld)


def sample_pictures() -> list[Image.Image]:
    """Two drawn pictures of the images' sizes; one carries a name in its metadata, as a file on a disk may."""
    y, x = np.mgrid[0:240, 0:320]
    bone = (120 + 100 * np.exp(-(((x - 160) / 40) ** 2)) - 40 * (abs(y - 120) < 3)).clip(0, 255).astype(np.uint8)
    y, x = np.mgrid[0:256, 0:256]
    disc = (np.hypot(x - 128, y - 128) < 100) * 140 + (np.hypot(x - 150, y - 110) < 8) * 90
    pictures = [Image.fromarray(bone), Image.fromarray(disc.astype(np.uint8)).convert("RGB")]
    pictures[0].info["comment"] = IDENTITY.name
    return pictures
