"""A small case for the report's check and its tests: two images, three questions, two models; and identifiers that can be searched for.

    export = sample_export(identity=None)         # without consent; PLANTED is what must not be found then

Everything is invented. The picture is drawn, not taken.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from hashlib import sha256

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
STUDY_UID = "1.2.826.0.1.3680043.8.498.77411958112300417733"
IDENTITY = PatientIdentity("OKONKWO^ADAEZE^M", "PID-7741-XQ", "1958-11-23", "F", "ACC90417733", STUDY_UID)
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
        "Transverse fracture of the distal radius, dorsal angulation ≈ 15°.\nNo dislocation. Soft tissues swollen.\n"
        "OKONKWO ADAEZE (PID-7741-XQ).",
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


def sample_reference(identity: PatientIdentity = IDENTITY) -> bytes:
    """A small DICOM file (secondary capture) of the patient, with identifiers in many tags: what a report joins with consent."""
    from io import BytesIO

    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 100"
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.7", f"{identity.study_uid}.1.1"
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = identity.study_uid, f"{identity.study_uid}.1"
    dataset.PatientName, dataset.PatientID = identity.name, identity.patient_id
    dataset.PatientBirthDate, dataset.PatientSex = identity.birth_date.replace("-", ""), identity.sex
    dataset.AccessionNumber, dataset.StudyID = identity.accession, "77"
    dataset.StudyDate, dataset.StudyTime, dataset.TimezoneOffsetFromUTC = "20260304", "084500", "+0100"
    dataset.ReferringPhysicianName, dataset.StudyDescription = "MÜLLER^JÖRG", f"Wrist of {identity.name}"
    dataset.Modality, dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = "OT", 2, 2, 1
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 8, 8, 7, 0
    dataset.PhotometricInterpretation, dataset.ConversionType, dataset.PixelData = "MONOCHROME2", "WSD", b"\0\1\2\3"
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    buffer = BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def joined_export(reference: bytes) -> Export:
    """The signed case with consent whose first image is the file `reference`."""
    export = sample_export(version=2)
    first = replace(export.images[0], sha256=sha256(reference).hexdigest())
    return replace(export, images=(first, *export.images[1:]))


HOSTILE = (
    "a\x00b \x1b[2J\x1b]0;title\x07 \x9b31m \u202etxt.exe\u202c \ufffe\uffff \ud83d lone \U0001f600 中文 {nb} {nb:x} \\ ^ = ~ | ` *\n"
    "# no heading\n- no item\n1. no list\n    no code\n"
    "<script>alert(1)</script> <b onload=x> &amp; &#60; ]]> <!-- --> [x](javascript:alert(1))\n"
    "http://example.invalid/?a=b&c=d www.example.invalid me@example.invalid ![i](http://example.invalid/i.png)\r\n\r\n\x0b\x0c\x85\u2028\u2029"
    "$x$ `code` ~~~\n```\nfence\n```\n\u00a0: \u202f; e\u0301 a\u0300\u0301\u0302\u0303\u0304 ש א ع" + "W" * 3000
)


def hostile_export(identity: PatientIdentity | None = None, signed: bool = True) -> Export:
    """The case with HOSTILE in every text that comes from outside."""
    export = sample_export(identity, signed)
    signer = f"Dr. {HOSTILE}" if signed else ""
    report = replace(export.report, findings=HOSTILE, impression=HOSTILE, recommendation="\x00\x1b", signed_by=signer)
    model = ModelIdentity(HOSTILE, HOSTILE, HOSTILE)
    messages = tuple(replace(message, text=HOSTILE, model=message.model and model) for message in export.messages)
    facts = ImageFacts("dicom", 1, 1, 1, HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    images = tuple(replace(image, name=HOSTILE, facts=facts) for image in export.images)
    case = replace(export.case, label=HOSTILE)
    return replace(export, case=case, report=report, messages=messages, images=images, institution=HOSTILE, withheld=None)


def arabic_export() -> Export:
    """The case's report in Arabic, with numbers and Latin words inside its lines."""
    export = sample_export()
    report = replace(
        export.report,
        findings="كسر مستعرض في الطرف البعيد من عظم الكعبرة (Colles) بزاوية 15°.\nلا يوجد خلع. الأنسجة الرخوة متورمة.",
        impression="كسر في الكعبرة اليسرى.",
        recommendation="رد الكسر وجبيرة، ومراجعة بعد 7 أيام (MRI إن لزم).",
    )
    return replace(export, report=report, language="ar", identity=replace(IDENTITY, name="أوكونكو^أدايزي"))
