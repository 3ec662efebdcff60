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

from edgemed.clinic.imaging.dataset import Refused, foreign, items, number, numbers, text, transfer_syntax, value
from edgemed.clinic.imaging.header import frame_group, read_windows

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.pixels.decoders.base import Decoder

Values = NDArray[Any]
JPEG_BASELINE, JPEG_EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
_INT32 = np.iinfo(np.int32)


def decode_frame(dataset: Dataset, index: int) -> tuple[dict[str, Any], Values]:
    """({windows, voi_lut, low, high, padding, monochrome}, array). Raises Refused."""
    stored, properties = decode_stored(dataset, index)
    photometric = str(properties["photometric_interpretation"])
    try:
        if photometric.startswith("MONOCHROME"):
            return _grey(dataset, index, stored)
        if photometric == "PALETTE COLOR":
            return _colour(), apply_palette(dataset, stored)
    except foreign():
        raise Refused("look-up tables that fit the pixels", "damaged ones") from None
    if photometric != "RGB" or stored.ndim != 3 or stored.shape[2] != 3:
        raise Refused("colours in RGB, YBR or a palette", "another colour space", "Export the image as RGB.")
    return _colour(), _eight_bits(stored, number(dataset, "BitsStored") or 8)


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
        array, properties = _decode(decoder, dataset, index)
    except MemoryError:
        raise Refused("a frame that fits into memory", "one that needs more") from None
    except foreign():
        raise Refused("pixels that can be decoded", "damaged ones, or a kind that is not supported", "Export it uncompressed.") from None
    return np.asarray(array), dict(properties)


def _decode(decoder: Decoder, dataset: Dataset, index: int) -> tuple[Values, Any]:
    # Pillow's libjpeg is the one that nearly every other program decodes 8-bit JPEG with; pylibjpeg's differs by up to 5 levels.
    if "pillow" in decoder.available_plugins and decoder.UID in (JPEG_BASELINE, JPEG_EXTENDED) and number(dataset, "BitsStored") == 8:
        try:
            return decoder.as_array(dataset, index=index, decoding_plugin="pillow")
        except foreign():
            pass  # the others may read it
    shift = _shift(dataset) if decoder.is_native else 0
    if not shift:
        return decoder.as_array(dataset, index=index)
    options: Any = {"bits_stored": (number(dataset, "HighBit") or 0) + 1}
    array, properties = decoder.as_array(dataset, index=index, **options)
    return np.asarray(array >> shift), properties


def _shift(dataset: Dataset) -> int:
    """By how much values lie above the lowest bits: old files keep them at the top of a word, and pydicom takes those at the bottom."""
    allocated, stored, high = (number(dataset, keyword) or 0 for keyword in ("BitsAllocated", "BitsStored", "HighBit"))
    return max(0, high + 1 - stored) if 0 < high < allocated and stored > 0 and "PixelData" in dataset else 0


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


def _eight_bits(array: Values, bits: int) -> Values:
    if bits == 8:
        return array.astype(np.uint8)
    top = (1 << bits) - 1
    return np.asarray(np.clip(np.rint(array.astype(np.float32) * np.float32(255 / top)), 0, 255), np.uint8)


def apply_palette(dataset: Dataset, stored: Values) -> Values:
    """Indices → uint8 [rows, columns, 3]. pydicom's own reads tables of big-endian files the wrong way round."""
    if value(dataset, "RedPaletteColorLookupTableData") is None:
        from pydicom.pixels.processing import apply_color_lut

        coloured = apply_color_lut(stored, dataset)[..., :3]  # segmented tables
        return _eight_bits(coloured, 8 * coloured.dtype.itemsize)
    return np.stack([_palette_channel(dataset, colour, stored) for colour in ("Red", "Green", "Blue")], axis=-1)


def _palette_channel(dataset: Dataset, colour: str, stored: Values) -> Values:
    descriptor = numbers(dataset, f"{colour}PaletteColorLookupTableDescriptor")
    count, first, bits = int(descriptor[0]) or 65_536, int(descriptor[1]), int(descriptor[2])
    data = value(dataset, f"{colour}PaletteColorLookupTableData")
    words = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if dataset.original_encoding[1] else ">u2")
    # 8-bit entries are two to a word where the table is only as long as that.
    entries = words.astype("<u2").view(np.uint8) if len(data) < 2 * count else words
    grey = entries[:count] >> 8 if bits == 16 and entries.dtype.itemsize == 2 else np.minimum(entries[:count], 255)
    at = np.clip(stored.astype(np.int64) - first, 0, len(grey) - 1)
    return np.asarray(grey[at], np.uint8)


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
