"""One frame of a data set → values to be windowed, or colours, inside the decoding process.

    found, array = decode_frame(dataset, index, frames)

Grey frames are [rows, columns] after the modality LUT (Hounsfield units of a CT), colours uint8 [rows, columns, 3] in RGB. Knows nothing
of windows on screen.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgemed.clinic.imaging.dataset import FOREIGN, Refused, items, number, numbers, text, transfer_syntax, value
from edgemed.clinic.imaging.header import frame_group, read_windows

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

Values = NDArray[Any]
_INT32 = np.iinfo(np.int32)


def decode_frame(dataset: Dataset, index: int) -> tuple[dict[str, Any], Values]:
    """({windows, voi_lut, low, high, padding, monochrome}, array). Raises Refused."""
    stored, properties = decode_stored(dataset, index)
    photometric = str(properties["photometric_interpretation"])
    try:
        if photometric.startswith("MONOCHROME"):
            return _grey(dataset, index, stored)
        if photometric == "PALETTE COLOR":
            from pydicom.pixels.processing import apply_color_lut

            coloured = apply_color_lut(stored, dataset)[..., :3]
            return _colour(), _eight_bits(coloured, 8 * coloured.dtype.itemsize)
    except FOREIGN:
        raise Refused("look-up tables that fit the pixels", "damaged ones") from None
    if photometric != "RGB" or stored.ndim != 3 or stored.shape[2] != 3:
        raise Refused("colours in RGB, YBR or a palette", "another colour space", "Export the image as RGB.")
    return _colour(), _eight_bits(stored, int(properties.get("bits_stored", 8)))


def decode_stored(dataset: Dataset, index: int) -> tuple[Values, dict[str, Any]]:
    """A frame as it is stored, YBR made RGB, with pydicom's properties of it. Raises Refused."""
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import UID

    syntax = transfer_syntax(dataset)
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise Refused("a still image in a known transfer syntax", "a video or an unknown one", "Export it uncompressed.") from None
    if not decoder.is_available:
        raise Refused("a decoder for this compression", "none installed", "", extra=True)
    _complete(dataset)
    try:
        dataset.file_meta.TransferSyntaxUID = UID(syntax)  # pydicom's decoder reads it there, and some files do not say
        array, properties = decoder.as_array(dataset, index=index)
    except MemoryError:
        raise Refused("a frame that fits into memory", "one that needs more") from None
    except FOREIGN:
        raise Refused("pixels that can be decoded", "damaged ones, or a kind that is not supported", "Export it uncompressed.") from None
    return _shifted(dataset, array, decoder.is_native), dict(properties)


def _complete(dataset: Dataset) -> None:
    """Fill in what old files leave out and what has one meaning only; anything else that is missing is refused."""
    bits = number(dataset, "BitsAllocated")
    if value(dataset, "SamplesPerPixel") is None:
        dataset.SamplesPerPixel = 1
    if value(dataset, "BitsStored") is None and bits is not None:
        dataset.BitsStored = bits
    if value(dataset, "PixelRepresentation") is None:
        dataset.PixelRepresentation = 0
    if value(dataset, "PhotometricInterpretation") is None:
        raise Refused("the meaning of the pixels (photometric interpretation)", "none")


def _shifted(dataset: Dataset, array: Values, native: bool) -> Values:
    # Old files keep their bits at the top of a word; pydicom takes those at the bottom.
    allocated, stored, high = (number(dataset, keyword) for keyword in ("BitsAllocated", "BitsStored", "HighBit"))
    if not native or array.dtype.kind not in "iu" or None in (allocated, stored, high):
        return array
    assert allocated is not None and stored is not None and high is not None
    shift = high + 1 - stored
    if shift <= 0 or high >= allocated:
        return array
    return np.asarray(array >> shift)


def _eight_bits(array: Values, bits: int) -> Values:
    if bits == 8:
        return array.astype(np.uint8)
    top = (1 << bits) - 1
    return np.asarray(np.clip(np.rint(array.astype(np.float32) * np.float32(255 / top)), 0, 255), np.uint8)


def _colour() -> dict[str, Any]:
    return {"windows": [], "voi_lut": None, "low": 0.0, "high": 255.0, "padding": None, "inverse": False, "monochrome": False}


def _grey(dataset: Dataset, index: int, stored: Values) -> tuple[dict[str, Any], Values]:
    padding = _padding(dataset, stored)
    values = _modality(dataset, index, stored)
    seen = values[~padding] if padding is not None and not padding.all() else values
    finite = seen[np.isfinite(seen)] if seen.dtype.kind == "f" else seen
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    edge = None
    if padding is not None and padding.any():
        outside = values[padding]
        edge = [float(outside.min()), float(outside.max())]
    told = {
        "windows": [asdict(window) for window in read_windows(dataset, index)],
        "voi_lut": _voi_lut(dataset),
        "low": low,
        "high": high,
        "padding": edge,
        "inverse": text(dataset, "PhotometricInterpretation") == "MONOCHROME1",
        "monochrome": True,
    }
    return told, values


def _padding(dataset: Dataset, stored: Values) -> NDArray[np.bool_] | None:
    first = number(dataset, "PixelPaddingValue")
    if first is None or stored.dtype.kind not in "iu":
        return None
    last = number(dataset, "PixelPaddingRangeLimit")
    low, high = min(first, first if last is None else last), max(first, first if last is None else last)
    info = np.iinfo(stored.dtype)
    if low > info.max or high < info.min:
        return None
    return np.asarray((stored >= max(low, info.min)) & (stored <= min(high, info.max)))


def _modality(dataset: Dataset, index: int, stored: Values) -> Values:
    group = frame_group(dataset, index, "PixelValueTransformationSequence")
    if items(dataset, "ModalityLUTSequence"):
        from pydicom.pixels.processing import apply_modality_lut

        return _small(apply_modality_lut(stored, dataset))
    slope, intercept = (numbers(group, keyword) for keyword in ("RescaleSlope", "RescaleIntercept"))
    m, b = (slope[0] if slope and slope[0] else 1.0), (intercept[0] if intercept else 0.0)
    if m == 1 and b == 0:
        return _small(stored)
    if stored.dtype.kind in "iu" and stored.dtype.itemsize <= 4 and m == int(m) and b == int(b) and stored.size:
        ends = (int(stored.min()) * m + b, int(stored.max()) * m + b)
        if max(abs(ends[0]), abs(ends[1])) < _INT32.max:
            return _small(stored.astype(np.int64) * int(m) + int(b))
    return np.asarray(stored.astype(np.float64) * m + b, np.float32)


def _small(values: Values) -> Values:
    """The same values in the smallest of the types that the program takes: int16, uint16, int32, float32."""
    if values.dtype.kind not in "iu":
        return np.asarray(values, np.float32)
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    for kind in (np.int16, np.uint16, np.int32):
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.float32)


def _voi_lut(dataset: Dataset) -> dict[str, Any] | None:
    """The first VOI LUT, None where there is none or it is not whole."""
    for item in items(dataset, "VOILUTSequence")[:1]:
        descriptor, data = numbers(item, "LUTDescriptor"), value(item, "LUTData")
        if len(descriptor) != 3 or data is None:
            return None
        count, first, bits = int(descriptor[0]) or 65_536, int(descriptor[1]), int(descriptor[2])
        if isinstance(data, bytes):
            order = "<" if dataset.original_encoding[1] else ">"
            data = np.frombuffer(data[: len(data) // 2 * 2], f"{order}u2").tolist()
        entries = [int(entry) & 0xFFFF for entry in data][:count] if hasattr(data, "__iter__") else []
        if entries and 1 <= bits <= 16:
            return {"first": first, "bits": bits, "entries": entries}
    return None
