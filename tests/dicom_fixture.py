"""Small DICOM files made from ordinary images, with identifiers planted everywhere that a device might put them.

data = make_dicom(image, "jpeg2000", bits=12)       # bytes
python tests/dicom_fixture.py FOLDER                 # one file of each kind, and a CT series, to try the program with
for word in PLANTED_WORDS: assert word.encode() not in written
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

RADIOGRAPH = Path(__file__).resolve().parents[1] / "edgemed/demo/radiograph.jpg"
SYNTAXES = {
    "implicit": ImplicitVRLittleEndian,
    "explicit": ExplicitVRLittleEndian,
    "big": ExplicitVRBigEndian,
    "deflated": DeflatedExplicitVRLittleEndian,
    "rle": RLELossless,
    "jpeg": JPEGBaseline8Bit,
    "jpegls": JPEGLSLossless,
    "jpeg2000": JPEG2000Lossless,
}
SOP_CLASSES = {
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
    "OT": "1.2.840.10008.5.1.4.1.1.7",
}
STUDY_UID = "1.2.826.0.1.3680043.8.498.111222333444"
# Words that are in no library, format or test by chance.
PLANTED: dict[str, Any] = {
    "PatientName": "Qwyzzel^Marguerita",
    "PatientID": "PID-7788812345",
    "PatientBirthDate": "19510417",
    "PatientSex": "F",
    "PatientAddress": "17 Xylograph Lane",
    "PatientTelephoneNumbers": "+254-700-555123",
    "PatientComments": "Sister of Qwyzzel Bartholomeo",
    "OtherPatientIDs": "NHS9434765919",
    "ReferringPhysicianName": "Drumblethwaite^Ignatius",
    "PerformingPhysicianName": "Okonkwobi^Ngozika",
    "OperatorsName": "Vandersnoot^Lieselotte",
    "InstitutionName": "Mwangazaville General",
    "InstitutionAddress": "4 Zebrafinch Road",
    "StationName": "XRAYROOMQ7",
    "StudyDescription": "Wrist of Marguerita Qwyzzel",
    "SeriesDescription": "Qwyzzel PA follow-up",
    "ProtocolName": "Qwyzzel protocol",
    "ImageComments": "called Mr Bartholomeo",
    "AccessionNumber": "ACC99120077",
    "StudyID": "SID4455",
    "DeviceSerialNumber": "SN0099887766",
    "StudyDate": "20240229",
    "StudyTime": "134501",
    "StudyInstanceUID": STUDY_UID,
    "SeriesInstanceUID": STUDY_UID + ".2",
    "WindowCenterWidthExplanation": "Qwyzzel window",
}
PLANTED_WORDS = (
    *("Qwyzzel", "Marguerita", "7788812345", "19510417", "Xylograph", "700-555123", "Bartholomeo", "9434765919", "Drumblethwaite"),
    *("Okonkwobi", "Vandersnoot", "Mwangazaville", "Zebrafinch", "XRAYROOMQ7", "99120077", "SID4455", "0099887766", "20240229"),
    *("111222333444", "PrivateQwy"),
)


def radiograph(bits: int = 12, width_px: int = 160) -> np.ndarray[Any, Any]:
    """The shipped radiograph as grey values of so many bits: int [height, width]."""
    image = Image.open(RADIOGRAPH).convert("L")
    image = image.resize((width_px, round(image.height * width_px / image.width)), Image.Resampling.BICUBIC)
    values = np.asarray(image, np.float64) / 255 * ((1 << bits) - 1)
    return np.rint(values).astype(np.uint16 if bits > 8 else np.uint8)


def make_dicom(
    pixels: np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]] | None = None,
    syntax: str = "explicit",
    *,
    bits: int = 12,
    modality: str = "CR",
    photometric: str = "",
    planted: bool = True,
    **tags: Any,
) -> bytes:
    """A file's bytes. `pixels` is a frame or a list of frames ([h, w] or [h, w, 3]); `tags` are set last, None removes one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what is wrong in a file here is meant
        return _make(pixels, syntax, bits, modality, photometric, planted, tags)


def _make(
    pixels: np.ndarray[Any, Any] | Sequence[np.ndarray[Any, Any]] | None,
    syntax: str,
    bits: int,
    modality: str,
    photometric: str,
    planted: bool,
    tags: dict[str, Any],
) -> bytes:
    frames = [radiograph(bits)] if pixels is None else [pixels] if isinstance(pixels, np.ndarray) else list(pixels)
    dataset = _dataset(frames, bits, modality, photometric)
    for keyword, value in (PLANTED if planted else {}).items():
        setattr(dataset, keyword, value)
    if planted:
        _plant_deeper(dataset)
    _encode(dataset, frames, syntax)
    for keyword, value in tags.items():
        if value is None:
            delattr(dataset, keyword)
        else:
            setattr(dataset, keyword, value)
    return write(dataset)


def write(dataset: Dataset) -> bytes:
    """A data set as a file's bytes."""
    out = io.BytesIO()
    dataset.save_as(out, enforce_file_format=True)
    return out.getvalue()


def _dataset(frames: list[np.ndarray[Any, Any]], bits: int, modality: str, photometric: str) -> Dataset:
    first, dataset = frames[0], Dataset()
    colour = first.ndim == 3
    dataset.SOPClassUID, dataset.SOPInstanceUID = SOP_CLASSES[modality], generate_uid()
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = generate_uid(), generate_uid()
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition, dataset.Laterality = modality, "WRIST", "PA", "L"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = first.shape[:2]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = photometric or ("RGB" if colour else "MONOCHROME2")
    if colour:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated = 8 * first.dtype.itemsize
    dataset.BitsStored = 8 if colour else bits
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(first.dtype.kind == "i")
    if len(frames) > 1:
        dataset.NumberOfFrames = len(frames)
    return dataset


def _plant_deeper(dataset: Dataset) -> None:
    item = Dataset()
    item.RequestedProcedureDescription, item.PatientName = "for Qwyzzel", "Qwyzzel^Nested"
    dataset.RequestAttributesSequence = Items([item])
    block = dataset.private_block(0x0099, "PrivateQwy", create=True)
    block.add_new(1, "LO", "Qwyzzel private")
    dataset.add_new(0x60000010, "US", 1)
    dataset.add_new(0x60000022, "LO", "Qwyzzel overlay")
    dataset.add_new(0x60004000, "LT", "Marguerita's overlay")


def _encode(dataset: Dataset, frames: list[np.ndarray[Any, Any]], syntax: str) -> None:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = SYNTAXES[syntax] if syntax in ("implicit", "big", "deflated") else ExplicitVRLittleEndian
    order = ">" if syntax == "big" else "<"
    data = b"".join(frame.astype(frame.dtype.newbyteorder(order)).tobytes() for frame in frames)
    dataset.add_new("PixelData", "OB" if frames[0].dtype.itemsize == 1 else "OW", data + b"\0" * (len(data) % 2))
    if syntax == "jpeg":
        dataset.PixelData = encapsulate([_jpeg(frame) for frame in frames])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        if dataset.SamplesPerPixel == 3:
            dataset.PhotometricInterpretation = "YBR_FULL_422"
    elif syntax in ("rle", "jpegls", "jpeg2000"):
        dataset.compress(SYNTAXES[syntax], generate_instance_uid=False)


def _jpeg(frame: np.ndarray[Any, Any]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(frame).save(out, "JPEG", quality=95, comment=b"Qwyzzel in a comment")
    return out.getvalue()


def ct_series(folder: Path, slices: int = 5) -> list[Path]:
    """A CT whose files are named against their order: slice n is brighter by n times 50 Hounsfield units."""
    series, study, paths = generate_uid(), generate_uid(), []
    for number in range(slices):
        values = (radiograph(8, 64).astype(np.int16) * 4 + 50 * number).astype(np.int16)
        data = make_dicom(
            values,
            bits=16,
            modality="CT",
            RescaleSlope=1,
            RescaleIntercept=-1024,
            InstanceNumber=number + 1,
            SeriesInstanceUID=series,
            StudyInstanceUID=study,
            ImagePositionPatient=[0, 0, 5.0 * number],
            ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
        )
        path = folder / f"IM{slices - number:03}"
        path.write_bytes(data)
        paths.append(path)
    return paths


def main(folder: Path) -> None:
    """Write one file of each syntax, a colour one, a cine loop and a CT series."""
    folder.mkdir(parents=True, exist_ok=True)
    for syntax in SYNTAXES:
        (folder / f"{syntax}.dcm").write_bytes(make_dicom(bits=8 if syntax == "jpeg" else 12, syntax=syntax))
    colour = np.asarray(Image.open(RADIOGRAPH).convert("RGB").resize((160, 120)))
    (folder / "ultrasound.dcm").write_bytes(make_dicom(colour, "jpeg", bits=8, modality="US"))
    loop = [np.roll(colour, 4 * n, axis=1) for n in range(6)]
    (folder / "loop.dcm").write_bytes(make_dicom(loop, "rle", bits=8, modality="US"))
    (folder / "ct").mkdir(exist_ok=True)
    ct_series(folder / "ct")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
