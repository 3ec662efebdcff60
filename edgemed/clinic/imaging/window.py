"""VOI windows and VOI LUTs on values, as DICOM PS3.3 C.11.2 defines them, and windows by name.

    grey = apply_window(values, Window(40, 400))         # uint8, 0 is black
    parse_window("40,400")                               # a window as a person types it

Knows neither files nor screens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemed.clinic.records import Window
from edgemed.core.errors import InputError

# Hounsfield units; centres and widths as radiology textbooks and viewers have them.
CT_WINDOWS = (
    Window(40, 400, name="soft tissue"),
    Window(-600, 1500, name="lung"),
    Window(400, 1800, name="bone"),
    Window(40, 80, name="brain"),
    Window(80, 200, name="subdural"),
    Window(60, 400, name="abdomen"),
)
# Integers over at most this many values are looked up in a table: exact, and several times faster than computing every pixel.
_TABLE_VALUES = 1 << 17


@dataclass(frozen=True)
class VoiLut:
    """A VOI LUT: `entries[0]` is what values up to `first` become, in `bits` bits."""

    first: int
    bits: int
    entries: tuple[int, ...]


def full_window(low: float, high: float, name: str = "full") -> Window:
    """The window that shows `low` black and `high` white; a frame of one value is black."""
    if not high > low:
        return Window(low + 0.5, 1.0, "linear_exact", name)
    return Window((low + high) / 2, high - low, "linear_exact", name)


def parse_window(text: str) -> Window:
    """A window from "centre,width". Raises InputError."""
    parts = text.replace(";", ",").split(",")
    try:
        centre, width = (float(part) for part in parts)
    except ValueError:
        centre, width = math.nan, math.nan
    if not (math.isfinite(centre) and math.isfinite(width) and width > 0):
        raise InputError(f"Expected a window as CENTRE,WIDTH with a width above 0, found '{text}'.", "For example: 40,400")
    return Window(centre, width)


def check_window(window: Window) -> None:
    """Raises InputError for a window that shows nothing."""
    if not (math.isfinite(window.centre) and math.isfinite(window.width) and window.width > 0):
        raise InputError(
            f"Expected a window with a width above 0, found centre {window.centre:g} and width {window.width:g}.", "Widen the window."
        )


def apply_window(values: NDArray[np.generic], window: Window) -> NDArray[np.uint8]:
    """Values of any shape → uint8 of the same shape. Raises InputError."""
    check_window(window)
    return _map(values, lambda x: _windowed(x, window))


def apply_voi_lut(values: NDArray[np.generic], lut: VoiLut) -> NDArray[np.uint8]:
    """Values of any shape → uint8 of the same shape; below the first and above the last entry, those stand."""
    entries = np.asarray(lut.entries, np.float64)
    # Some devices state 16 bits over entries of 12: their largest value, not the statement, is white where it is beyond it.
    top = max(float((1 << lut.bits) - 1), float(entries.max(initial=1)))
    grey = np.clip(np.rint(entries / top * 255), 0, 255)
    return _map(values, lambda x: grey[np.clip(np.rint(x) - lut.first, 0, len(grey) - 1).astype(np.int64)])


def _windowed(x: NDArray[np.float64], window: Window) -> NDArray[np.float64]:
    centre, width = window.centre, window.width
    if window.function == "sigmoid":
        # Beyond 40 the exponential is 0 or out of range, and the grey the same.
        return 255.0 / (1.0 + np.exp(np.clip(-4.0 * (x - centre) / width, -40.0, 40.0)))
    if window.function == "linear" and width >= 1:
        centre, width = centre - 0.5, width - 1.0
    if width == 0:
        return np.where(x > centre, 255.0, 0.0)
    return np.clip((x - centre) / width + 0.5, 0.0, 1.0) * 255.0


def _map(values: NDArray[np.generic], function: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> NDArray[np.uint8]:
    if values.size and values.dtype.kind in "iu":
        low, high = int(values.min()), int(values.max())
        if high - low < min(_TABLE_VALUES, values.size):
            table = _round(function(np.arange(low, high + 1, dtype=np.float64)))
            return table[values.astype(np.int64) - low]
    out = np.empty(values.shape, np.uint8)
    for row in range(len(values)):  # a row at a time: 64 Mpx in float64 would be half a GB
        out[row] = _round(function(np.nan_to_num(values[row].astype(np.float64))))
    return out


def _round(grey: NDArray[np.float64]) -> NDArray[np.uint8]:
    return np.rint(grey).astype(np.uint8)
