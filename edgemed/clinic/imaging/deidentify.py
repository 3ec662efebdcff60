"""A DICOM file that says nobody's name, inside the decoding process: PS3.15 Annex E's basic profile, kept by an allow-list.

    copy = strip(dataset, key, masks)

Only what the tables below name is written anew; everything else, private tags, free text, dates, overlays, curves and comments with it,
is not there any more. The profile's own table says what to remove; a tag it does not know yet, or that a device filled with something
else, would pass it. Kept values are written as the dictionary's type of them, so that no text hides in a number.

The pixels are decoded and written uncompressed: comments inside a JPEG stream, bits beyond those stored and bytes behind the last frame
do not survive. What is burnt into them does, but where a mask covers it. Uids are replaced by a keyed hash: one key gives files that
still belong together, and no way back. An enhanced multi-frame file loses functional groups that viewers do not need.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import re
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemed.clinic.imaging.dataset import Refused, foreign, items, number, numbers, text, value
from edgemed.clinic.imaging.frames import decode_stored
from edgemed.clinic.imaging.header import check_size, count_frames, read_facts
from edgemed.clinic.imaging.limits import MAX_COPY_BYTES

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

_NUMBERS = (
    *("InstanceNumber", "SeriesNumber", "AcquisitionNumber", "FrameTime", "CineRate", "RecommendedDisplayFrameRate", "PixelAspectRatio"),
    *("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "SliceThickness", "SpacingBetweenSlices", "SliceLocation"),
    *("ImagePositionPatient", "ImageOrientationPatient", "KVP", "ExposureTime", "XRayTubeCurrent", "Exposure", "EchoTime", "FlipAngle"),
    *("RepetitionTime", "InversionTime", "EchoTrainLength", "MagneticFieldStrength", "DistanceSourceToDetector", "GantryDetectorTilt"),
    *("WindowCenter", "WindowWidth", "RescaleIntercept", "RescaleSlope", "LossyImageCompressionRatio", "PixelPaddingValue"),
    *("PixelPaddingRangeLimit", "RedPaletteColorLookupTableDescriptor", "GreenPaletteColorLookupTableDescriptor"),
    *("BluePaletteColorLookupTableDescriptor", "LUTDescriptor", "DoseGridScaling", "UltrasoundColorDataPresent"),
)
# Coded words, and those that the standard allows; anything else in their place is left out.
_CODES = {
    "VOILUTFunction": "LINEAR LINEAR_EXACT SIGMOID",
    "PresentationLUTShape": "IDENTITY INVERSE",
    "LossyImageCompression": "00 01",
    "BurnedInAnnotation": "YES NO",
    "RescaleType": "OD HU US MGML Z_EFF ED",
    "ModalityLUTType": "OD HU US MGML Z_EFF ED",
    "ImageLaterality": "L R B U",
    "ConversionType": "DV DI DF WSD SD SI DRW SYN",
    "PixelIntensityRelationship": "LIN LOG DISP",
    "ScanningSequence": "SE IR GR EP RM",
    "SequenceVariant": "SK MTC SS TRSS SP MP OSP NONE",
    "ScanOptions": "PER RG CG PPG FC PFF PFP SP FS",
    "MRAcquisitionType": "2D 3D",
    "PatientPosition": "HFS HFP FFS FFP HFDR HFDL FFDR FFDL",
}
_TABLES = (
    *("LUTData", "RedPaletteColorLookupTableData", "GreenPaletteColorLookupTableData", "BluePaletteColorLookupTableData"),
    *("SegmentedRedPaletteColorLookupTableData", "SegmentedGreenPaletteColorLookupTableData", "SegmentedBluePaletteColorLookupTableData"),
)
_SEQUENCES = (
    *("ModalityLUTSequence", "VOILUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
    *("PixelValueTransformationSequence", "FrameVOILUTSequence", "PixelMeasuresSequence", "PlanePositionSequence"),
    "PlaneOrientationSequence",
)
_UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
# Attributes that every image must have and that may be empty.
_EMPTIED = (
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyID", "PatientBirthDate", "PatientSex", "Manufacturer"),
    *("PatientOrientation", "ContentDate", "ContentTime"),
)
_IMAGE_TYPES = ({"ORIGINAL", "DERIVED"}, {"PRIMARY", "SECONDARY"}, {"AXIAL", "LOCALIZER", "PROJECTION IMAGE", "OTHER", "M", "P"})
_METHOD = "PS3.15 basic profile by an allow-list"
_MAX_DEPTH = 4
_STANDARD_UID = r"1\.2\.840\.10008\.[0-9.]{1,40}"
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def strip(dataset: Dataset, key: bytes, masks: list[list[float]]) -> bytes:
    """The copy's bytes. `masks` are boxes as parts of width and height. Raises Refused."""
    from pydicom.dataset import Dataset as New
    from pydicom.uid import ExplicitVRLittleEndian

    copy = New()
    _copy_elements(dataset, copy, 0)
    _copy_kind(dataset, copy)
    _write_pixels(dataset, copy, masks)
    _write_identity(dataset, copy, key)
    copy.ensure_file_meta()
    copy.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    out = io.BytesIO()
    copy.preamble = bytes(128)
    try:
        copy.save_as(out, enforce_file_format=True)
    except MemoryError:
        raise
    except foreign():
        raise Refused("values that can be written again", "damaged ones") from None
    return out.getvalue()


def _copy_elements(source: Dataset, copy: Dataset, depth: int) -> None:
    for keyword in _NUMBERS:
        _add_numbers(copy, keyword, numbers(source, keyword), signed=bool(number(source, "PixelRepresentation")))
    for keyword, allowed in _CODES.items():
        if kept := [word for word in coded(source, keyword) if word in allowed.split()]:
            setattr(copy, keyword, kept if len(kept) > 1 else kept[0])
    for keyword in (*_NUMBERS, *_CODES):
        if _is_empty(source, keyword):
            setattr(copy, keyword, None)  # the standard wants many of these to be there, if only empty
    for keyword in _TABLES:
        _add_table(source, copy, keyword)
    for keyword in _SEQUENCES if depth < _MAX_DEPTH else ():
        found_items = items(source, keyword)
        if found_items:
            _add_sequence(copy, keyword, found_items, depth)


def _is_empty(source: Dataset, keyword: str) -> bool:
    try:
        return keyword in source and bool(source[keyword].is_empty)
    except foreign():
        return False


def _add_sequence(copy: Dataset, keyword: str, sources: list[Dataset], depth: int) -> None:
    from pydicom.dataset import Dataset as New

    out = []
    for source in sources:
        item = New()
        _copy_elements(source, item, depth + 1)
        out.append(item)
    setattr(copy, keyword, out)


def _add_numbers(copy: Dataset, keyword: str, found: list[float], signed: bool) -> None:
    from pydicom.datadict import dictionary_VR
    from pydicom.valuerep import DSfloat

    if not found:
        return
    kind = dictionary_VR(keyword)
    if " or " in kind:
        kind = "SS" if min(found) < 0 or (signed and max(found) < 1 << 15) else "US"
    out: list[Any] = list(found) if kind in ("FD", "FL") else [int(x) for x in found]
    if kind == "DS":
        out = [DSfloat(x, auto_format=True) for x in found]
    copy.add_new(keyword, kind, out if len(out) > 1 else out[0])


def _add_table(source: Dataset, copy: Dataset, keyword: str) -> None:
    found = value(source, keyword)
    if found is None:
        return
    if isinstance(found, bytes):
        order = "<" if _little(source) else ">"
        found = np.frombuffer(found[: len(found) // 2 * 2], f"{order}u2")
    data = np.asarray(found)
    if data.dtype.kind in "iu" and data.ndim == 1:
        copy.add_new(keyword, "OW", data.astype("<u2").tobytes())


def _little(source: Dataset) -> bool:
    return source.original_encoding[1] is not False


def _copy_kind(dataset: Dataset, copy: Dataset) -> None:
    stated = text(dataset, "SOPClassUID")
    copy.SOPClassUID = stated if re.fullmatch(_STANDARD_UID, stated) else _SECONDARY_CAPTURE
    facts = read_facts(dataset)
    copy.Modality = facts["modality"] or "OT"
    for keyword, fact in (("BodyPartExamined", "body_part"), ("ViewPosition", "view_position"), ("Laterality", "laterality")):
        if keyword in dataset:
            setattr(copy, keyword, facts[fact])
    if copy.Modality == "MR" and "ScanOptions" not in copy:
        copy.ScanOptions = ""
    found = [*coded(dataset, "ImageType"), "", "", ""]
    kept = [word if word in allowed else "" for word, allowed in zip(found, _IMAGE_TYPES, strict=False)]
    third = kept[2] or ("OTHER" if copy.Modality == "MR" else "")  # which MR images must have
    copy.ImageType = [kept[0] or "DERIVED", kept[1] or "SECONDARY", *([third] if third else [])]


def coded(source: Dataset, keyword: str) -> list[str]:
    """An element's coded words; [] where it is missing."""
    found = value(source, keyword)
    parts = [] if found is None else [found] if isinstance(found, str) else found if hasattr(found, "__iter__") else []
    return [str(part).strip().upper() for part in parts]


def _write_identity(dataset: Dataset, copy: Dataset, key: bytes) -> None:
    from pydicom.dataset import Dataset as New

    for keyword in _EMPTIED:
        setattr(copy, keyword, "")
    for keyword in ("SeriesNumber", "InstanceNumber"):
        if keyword not in copy:
            setattr(copy, keyword, None)
    for keyword in _UIDS:
        found = text(dataset, keyword)
        if found or keyword != "FrameOfReferenceUID":
            setattr(copy, keyword, hashed_uid(key, found or str(uuid.uuid4())))
    if "FrameOfReferenceUID" in copy:
        copy.PositionReferenceIndicator = ""
    copy.PatientName = "ANONYMOUS"
    copy.PatientID = "ANON-" + hmac.new(key, text(dataset, "PatientID").encode(), hashlib.sha256).hexdigest()[:12]
    copy.PatientIdentityRemoved = "YES"
    copy.LongitudinalTemporalInformationModified = "REMOVED"
    copy.DeidentificationMethod = _METHOD
    code = New()
    code.CodeValue, code.CodingSchemeDesignator = "113100", "DCM"
    code.CodeMeaning = "Basic Application Confidentiality Profile"
    copy.DeidentificationMethodCodeSequence = [code]
    copy.SpecificCharacterSet = "ISO_IR 192"


def hashed_uid(key: bytes, uid: str) -> str:
    """A uid in the space that anybody may use (2.25 and a random number of 128 bits), the same for one key and uid."""
    digest = hmac.new(key, uid.encode(), hashlib.sha256).digest()[:16]
    return f"2.25.{uuid.UUID(bytes=digest, version=4).int}"


def _write_pixels(dataset: Dataset, copy: Dataset, masks: list[list[float]]) -> None:
    rows, columns = check_size(dataset)
    frames, _ = count_frames(dataset, rows, columns)
    out, photometric = bytearray(), ""
    for index in range(frames):
        array, properties = decode_stored(dataset, index)
        array = np.array(array)
        for left, top, right, bottom in masks:
            array[_part(top, rows, False) : _part(bottom, rows, True), _part(left, columns, False) : _part(right, columns, True)] = 0
        out += array.astype(array.dtype.newbyteorder("<")).tobytes()
        photometric = str(properties["photometric_interpretation"])
        if len(out) * (frames / (index + 1)) > MAX_COPY_BYTES:
            raise Refused(f"at most {MAX_COPY_BYTES >> 20} MiB of pixels", "more", "Export fewer frames.")
    _write_format(dataset, copy, array, photometric, frames)
    keyword = {"f4": "FloatPixelData", "f8": "DoubleFloatPixelData"}.get(array.dtype.str[1:], "PixelData")
    kind = {"FloatPixelData": "OF", "DoubleFloatPixelData": "OD"}.get(keyword, "OB" if array.dtype.itemsize == 1 else "OW")
    copy.add_new(keyword, kind, bytes(out) + b"\0" * (len(out) % 2))


def _write_format(dataset: Dataset, copy: Dataset, array: NDArray[Any], photometric: str, frames: int) -> None:
    copy.Rows, copy.Columns = array.shape[:2]
    copy.SamplesPerPixel = array.shape[2] if array.ndim == 3 else 1
    copy.PhotometricInterpretation = photometric
    if copy.SamplesPerPixel > 1:
        copy.PlanarConfiguration = 0
    if frames > 1:
        copy.NumberOfFrames = frames
        if "FrameTime" in copy:
            copy.add_new("FrameIncrementPointer", "AT", 0x00181063)
    copy.BitsAllocated = 8 * array.dtype.itemsize
    if array.dtype.kind in "iu":
        stored = number(dataset, "BitsStored") or copy.BitsAllocated
        copy.BitsStored = stored if 1 < stored <= copy.BitsAllocated else copy.BitsAllocated
        copy.HighBit, copy.PixelRepresentation = copy.BitsStored - 1, int(array.dtype.kind == "i")


def _part(fraction: float, of: int, up: bool) -> int:
    at = fraction * of
    return max(0, min(of, int(-(-at // 1)) if up else int(at)))
