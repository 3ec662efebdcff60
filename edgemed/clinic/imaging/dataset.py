"""Bytes → pydicom data set, inside the decoding process. What is no DICOM image is Refused, in words that hold nothing of the file.

    dataset = read_dataset(data)
    rows = number(dataset, "Rows")

Reads what hostile files hold, too: deflated data is inflated up to a limit, values that break their own rules count as missing.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.clinic.imaging.limits import MAX_INFLATED_BYTES, MAX_TEXT
from edgemed.clinic.imaging.sniff import PREAMBLE_BYTES
from edgemed.core.text import one_line

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

# A file's meta header is far shorter.
_HEAD_BYTES = 1 << 16
_EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
_DEFLATED = "1.2.840.10008.1.2.1.99"


def foreign() -> tuple[type[Exception], ...]:
    """What pydicom, numpy and the codecs raise on files that are not as they should be. Their words may quote the file: not passed on."""
    from pydicom.errors import BytesLengthException, InvalidDicomError

    usual = (OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, MemoryError)
    return (*usual, AssertionError, SyntaxError, struct.error, zlib.error, BytesLengthException, InvalidDicomError)


class Refused(Exception):
    """Why a file is not shown: what was expected, what was found, what to do."""

    def __init__(self, expected: str, found: str, hint: str = "Export the image again, or ask who sent it.", extra: bool = False) -> None:
        super().__init__(expected, found, hint)
        self.expected, self.found, self.hint, self.extra = expected, found, hint, extra


def read_dataset(data: bytes, header_only: bool = False) -> Dataset:
    """Parse a file's bytes; with `header_only` up to the pixels. Raises Refused."""
    import pydicom

    try:
        return pydicom.dcmread(io.BytesIO(_inflated(data)), force=True, stop_before_pixels=header_only)
    except RecursionError:
        raise Refused("a DICOM image", "sequences nested deeper than any real file's") from None
    except MemoryError:
        raise Refused("a DICOM image that fits into memory", "one that needs more") from None
    except foreign():
        raise Refused("a whole DICOM image", "a damaged or cut-off file") from None


def read_header(path: Path) -> Dataset:
    """Parse a file up to its pixels, reading no more than that of it, but for deflated ones. Raises Refused."""
    import pydicom

    try:
        with path.open("rb") as f:
            head = f.read(_HEAD_BYTES)
            if _deflated_at(head) is not None:
                return read_dataset(head + f.read(MAX_INFLATED_BYTES), header_only=True)
            f.seek(0)
            return pydicom.dcmread(f, force=True, stop_before_pixels=True)
    except foreign():
        raise Refused("a whole DICOM image", "a damaged or cut-off file") from None


def _inflated(data: bytes) -> bytes:
    """The file as it is, or with a deflated data set inflated: pydicom would inflate without a limit."""
    start = _deflated_at(data)
    if start is None:
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(data[start:], MAX_INFLATED_BYTES)
    if inflater.unconsumed_tail:
        raise Refused(f"a deflated file of at most {MAX_INFLATED_BYTES >> 20} MiB", "one that inflates to more")
    uid = _EXPLICIT_LITTLE.encode() + b"\0"
    return bytes(PREAMBLE_BYTES) + b"DICM" + struct.pack("<HH2sH", 2, 0x10, b"UI", len(uid)) + uid + body


def _deflated_at(data: bytes) -> int | None:
    """Where a deflated data set begins; None where the file has none."""
    from pydicom.filereader import read_dataset as read_elements

    if data[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] != b"DICM" or _DEFLATED.encode() not in data[:_HEAD_BYTES]:
        return None
    stream = io.BytesIO(data)
    stream.seek(PREAMBLE_BYTES + 4)
    meta = read_elements(stream, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    return stream.tell() if str(meta.get("TransferSyntaxUID", "")) == _DEFLATED else None


def value(dataset: Dataset, keyword: str) -> Any:
    """An element's value, None where it is missing, empty, or breaks the rules of its type."""
    try:
        found = dataset.get(keyword)
        return None if found is None or found == "" else found
    except foreign():
        return None


def text(dataset: Dataset, keyword: str, limit: int = MAX_TEXT) -> str:
    """An element as one clean line, "" where it is missing."""
    found = value(dataset, keyword)
    try:
        return one_line("" if found is None else str(found))[:limit].strip()
    except foreign():
        return ""


def numbers(dataset: Dataset, keyword: str) -> list[float]:
    """An element's finite numbers; [] where it is missing or holds anything else."""
    found = value(dataset, keyword)
    if found is None:
        return []
    try:
        out = [float(item) for item in (found if hasattr(found, "__iter__") and not isinstance(found, str) else [found])]
    except foreign():
        return []
    return out if all(abs(x) < float("inf") for x in out) else []


def number(dataset: Dataset, keyword: str) -> int | None:
    """An element's first whole number."""
    found = numbers(dataset, keyword)
    return int(found[0]) if found else None


def items(dataset: Dataset, keyword: str) -> list[Dataset]:
    """A sequence's items; [] where it is missing or no sequence."""
    from pydicom.sequence import Sequence

    found = value(dataset, keyword)
    return list(found) if isinstance(found, Sequence) else []


def transfer_syntax(dataset: Dataset) -> str:
    """The file's transfer syntax; where its meta header does not say, what its first elements are written in."""
    from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

    stated = text(getattr(dataset, "file_meta", None) or dataset, "TransferSyntaxUID")
    if stated:
        return stated
    implicit, little = dataset.original_encoding
    return str(ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian if little else ExplicitVRBigEndian)
