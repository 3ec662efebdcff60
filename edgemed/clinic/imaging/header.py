"""A data set → what is told of it (inside the decoding process), and the same as a frozen value (in the program).

    header = Header.of(describe(dataset))

Of what identifies nobody only modality, body part, view and side are taken, and not even those where they repeat a word of the
patient's name or number. Size and amount of the pixels are checked against limits and the bytes that are there, before any is decoded.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from edgemed.clinic.imaging.dataset import Refused, items, number, numbers, text, transfer_syntax, value
from edgemed.clinic.imaging.limits import MAX_FRAMES, MAX_TEXT
from edgemed.clinic.records import PatientIdentity, Window, WindowFunction
from edgemed.core.images import MAX_PIXELS, MAX_SIDE_PX
from edgemed.core.text import one_line

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_FACTS = {"modality": "Modality", "body_part": "BodyPartExamined", "view_position": "ViewPosition", "laterality": "Laterality"}
_IDENTIFYING = (
    *("PatientName", "PatientID", "OtherPatientIDs", "PatientBirthName", "PatientMotherBirthName", "PatientBirthDate", "AccessionNumber"),
    *("ReferringPhysicianName", "PerformingPhysicianName", "OperatorsName", "PhysiciansOfRecord", "InstitutionName", "StudyID"),
)
# What comes as pixels and is no picture of a patient.
_OTHER_PIXELS = {
    "1.2.840.10008.5.1.4.1.1.481.2": "a radiotherapy dose",
    "1.2.840.10008.5.1.4.1.1.66.4": "a segmentation",
    "1.2.840.10008.5.1.4.1.1.30": "a parametric map",
}
_PIXELS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_FUNCTIONS: dict[str, WindowFunction] = {"LINEAR": "linear", "LINEAR_EXACT": "linear_exact", "SIGMOID": "sigmoid"}
# Beyond this ratio of a pixel's sides the number is a mistake, not a device's.
_MAX_ASPECT = 8.0


@dataclass(frozen=True)
class Header:
    """What the program knows of a DICOM image before any frame is decoded. `aspect` is a pixel's height over its width."""

    rows: int
    columns: int
    frames: int
    monochrome: bool
    aspect: float
    facts: dict[str, str]
    identity: PatientIdentity
    windows: tuple[Window, ...]
    burnt_in: str
    secondary: bool
    hounsfield: bool
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, told: dict[str, Any]) -> Header:
        """From `describe`'s words, which are not trusted. TypeError, KeyError or ValueError where they are not those."""
        sizes = {name: int(told[name]) for name in ("rows", "columns", "frames")}
        if min(sizes.values()) < 1 or sizes["rows"] * sizes["columns"] > MAX_PIXELS:
            raise ValueError("a size that was not checked")
        nested = {
            "facts": {name: one_line(told["facts"][name])[:MAX_TEXT] for name in _FACTS},
            "identity": PatientIdentity(**{name: one_line(found) for name, found in told["identity"].items()}),
            "windows": tuple(Window(**window) for window in told["windows"]),
            "warnings": tuple(one_line(warning) for warning in told["warnings"]),
        }
        return cls(**(told | sizes | nested))


def describe(dataset: Dataset) -> dict[str, Any]:
    """Everything of `Header` as JSON. Raises Refused."""
    other = _OTHER_PIXELS.get(text(dataset, "SOPClassUID"))
    if other is not None:
        raise Refused("a DICOM file with an image", other, "Choose the images that it was made from.")
    rows, columns = check_size(dataset)
    frames, warnings = count_frames(dataset, rows, columns)
    monochrome = text(dataset, "PhotometricInterpretation").startswith("MONOCHROME")
    facts = read_facts(dataset)
    aspect = pixel_aspect(dataset)
    if abs(aspect - 1) > 0.01:
        warnings.append("The image's pixels are not square; it is shown with the right proportions.")
    if any((group, 0x3000) in dataset for group in range(0x6000, 0x6020, 2)):
        warnings.append("The file has drawings laid over the image; they are not shown.")
    types = text(dataset, "ImageType", 200).upper()
    rescaled = numbers(frame_group(dataset, 0, "PixelValueTransformationSequence"), "RescaleSlope")
    return {
        "rows": rows,
        "columns": columns,
        "frames": frames,
        "monochrome": monochrome,
        "aspect": aspect,
        "facts": facts,
        "identity": asdict(read_identity(dataset)),
        "windows": [asdict(window) for window in read_windows(dataset, 0)] if monochrome else [],
        "burnt_in": text(dataset, "BurnedInAnnotation").upper(),
        "secondary": "SECONDARY" in types or text(dataset, "SOPClassUID").startswith("1.2.840.10008.5.1.4.1.1.7"),
        "hounsfield": facts["modality"] == "CT" and bool(rescaled),
        "warnings": warnings,
    }


def check_size(dataset: Dataset) -> tuple[int, int]:
    """(rows, columns). Raises Refused where there are no pixels, or too many."""
    if not any(keyword in dataset for keyword in _PIXELS):
        if not len(dataset):
            raise Refused("a DICOM image", "a file that is none, or only its beginning")
        raise Refused("a DICOM file with an image", "one without pixels, or cut off before them", "Choose the image of this study.")
    rows, columns = number(dataset, "Rows") or 0, number(dataset, "Columns") or 0
    if rows < 1 or columns < 1:
        raise Refused("the number of rows and columns", "none")
    if rows * columns > MAX_PIXELS or max(rows, columns) > MAX_SIDE_PX:
        raise Refused(f"a frame of at most {MAX_PIXELS // 1_000_000} megapixels", f"one of {columns} × {rows}")
    return rows, columns


def count_frames(dataset: Dataset, rows: int, columns: int) -> tuple[int, list[str]]:
    """(frames that are there, warnings). Raises Refused where not one is."""
    declared = max(1, number(dataset, "NumberOfFrames") or 1)
    there = _frames_there(dataset, rows, columns)
    if there < 1:
        raise Refused(f"pixels for {columns} × {rows}", "fewer bytes than one frame takes")
    frames = min(declared, there, MAX_FRAMES)
    dataset.NumberOfFrames = frames  # for pydicom's decoder; what the file says may be no number at all
    if frames < declared:
        return frames, [f"The file declares {declared} frames and holds {frames}."]
    return frames, []


def _frames_there(dataset: Dataset, rows: int, columns: int) -> int:
    from pydicom.encaps import parse_fragments
    from pydicom.uid import UID

    keyword = next(keyword for keyword in _PIXELS if keyword in dataset)
    data = value(dataset, keyword)
    if not isinstance(data, bytes | bytearray):
        raise Refused("pixels", "an element of another type in their place")
    syntax = UID(transfer_syntax(dataset))
    if syntax.is_transfer_syntax and syntax.is_encapsulated:
        return parse_fragments(data)[0]
    bits = number(dataset, "BitsAllocated") or {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(keyword, 0)
    samples = number(dataset, "SamplesPerPixel") or 1
    if not 1 <= bits <= 64 or not 1 <= samples <= 4:
        raise Refused("1 to 64 bits and 1 to 4 samples a pixel", f"{bits} bits and {samples} samples")
    if text(dataset, "PhotometricInterpretation") == "YBR_FULL_422":
        samples = 2
    return len(data) * 8 // (rows * columns * samples * bits)


def pixel_aspect(dataset: Dataset) -> float:
    """A pixel's height over its width; 1 where nothing is said, or nothing sensible."""
    for keyword in ("PixelAspectRatio", "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing"):
        pair = numbers(dataset, keyword)
        if len(pair) == 2 and min(pair) > 0:
            ratio = pair[0] / pair[1]
            return ratio if 1 / _MAX_ASPECT <= ratio <= _MAX_ASPECT else 1.0
    return 1.0


def read_facts(dataset: Dataset) -> dict[str, str]:
    """The four tags that identify nobody, as the standard writes them, unless they do identify somebody."""
    known = identifying_words(dataset)
    out = {}
    for name, keyword in _FACTS.items():
        found = re.sub(r"[^A-Z0-9_ \-]", "", text(dataset, keyword, 16).upper()).strip()
        out[name] = "" if words(found) & known else found
    out["laterality"] = out["laterality"] or _image_laterality(dataset)
    return out


def _image_laterality(dataset: Dataset) -> str:
    found = text(dataset, "ImageLaterality")
    return found if found in ("L", "R", "B", "U") else ""


def identifying_words(dataset: Dataset) -> set[str]:
    """The words of three letters or more in what names the patient, those who cared, and where."""
    return {word for keyword in _IDENTIFYING for word in words(text(dataset, keyword, 400))}


def words(found: str) -> set[str]:
    """A text's words of three letters or more, in capitals."""
    return {word for word in re.split(r"[\W_]+", found.upper()) if len(word) >= 3}


def read_identity(dataset: Dataset) -> PatientIdentity:
    """Who the file says the patient is."""
    born = text(dataset, "PatientBirthDate")
    sex = text(dataset, "PatientSex").upper()
    return PatientIdentity(
        name=text(dataset, "PatientName", 128).rstrip("^="),
        patient_id=text(dataset, "PatientID"),
        birth_date=iso_date(born),
        sex=sex if sex in ("M", "F", "O") else "",
        accession=text(dataset, "AccessionNumber"),
        study_uid=text(dataset, "StudyInstanceUID"),
    )


def iso_date(found: str) -> str:
    """DICOM's 20240229 as 2024-02-29; "" for what is no such date."""
    return f"{found[:4]}-{found[4:6]}-{found[6:]}" if re.fullmatch(r"\d{8}", found) else ""


def frame_group(dataset: Dataset, frame: int, keyword: str) -> Dataset:
    """Where a frame's own values are: its functional group, the group shared by all, or the data set itself."""
    per_frame = items(dataset, "PerFrameFunctionalGroupsSequence")
    shared = items(dataset, "SharedFunctionalGroupsSequence")
    for group in per_frame[frame : frame + 1] + shared[:1]:
        if found := items(group, keyword):
            return found[0]
    return dataset


def read_windows(dataset: Dataset, frame: int) -> list[Window]:
    """The file's windows for a frame, those left out that can show nothing."""
    group = frame_group(dataset, frame, "FrameVOILUTSequence")
    centres, widths = numbers(group, "WindowCenter"), numbers(group, "WindowWidth")
    names = value(group, "WindowCenterWidthExplanation")
    function = _FUNCTIONS.get(text(group, "VOILUTFunction").upper(), "linear")
    many = [] if names is None else [names] if isinstance(names, str) else list(names)
    out = []
    for index, (centre, width) in enumerate(zip(centres, widths, strict=False)):
        if width > 0 and math.isfinite(centre + width):
            # The explanation is free text; it is kept as a number, so that no name can be in it.
            out.append(Window(centre, width, function, name=str(index + 1) if len(many) > 1 else ""))
    return out


def describe_place(dataset: Dataset) -> dict[str, Any]:
    """Where an image belongs: study, series, its number in it and its position along the stack. Raises Refused where it is none.

    The descriptions and the date are for the screen on which a person chooses, and nowhere else.
    """
    if not number(dataset, "Rows"):
        raise Refused("an image", "a DICOM file without one")
    return {
        "study": text(dataset, "StudyInstanceUID"),
        "series": text(dataset, "SeriesInstanceUID"),
        "number": number(dataset, "SeriesNumber") or 0,
        "modality": read_facts(dataset)["modality"],
        "description": text(dataset, "SeriesDescription"),
        "study_description": text(dataset, "StudyDescription"),
        "study_date": iso_date(text(dataset, "StudyDate")),
        "uid": text(dataset, "SOPInstanceUID"),
        "instance": number(dataset, "InstanceNumber"),
        "position": _position(dataset),
    }


def _position(dataset: Dataset) -> float | None:
    """Millimetres along the normal of the image's plane."""
    at, plane = numbers(dataset, "ImagePositionPatient"), numbers(dataset, "ImageOrientationPatient")
    if len(at) != 3 or len(plane) != 6:
        return None
    (a, b, c), (d, e, f) = plane[:3], plane[3:]
    return round(at[0] * (b * f - c * e) + at[1] * (c * d - a * f) + at[2] * (a * e - b * d), 3)
