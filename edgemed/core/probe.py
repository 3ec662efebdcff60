"""The fixed probe of the parity certificate: an image and a text made from a seed, and short summaries of what they cause.

At conversion the right embedding of the probe is computed from the source weights and kept as a summary; a runtime encodes the
same image and compares. A summary keeps single rows apart (it projects each to a few numbers), so that a shifted position or a
dropped patch shows, which an average over the image would hide. Bytes come from SHAKE-256, the same on every platform and version.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

PROBE_SEED = "edgemed probe 1"
PROBE_QUESTION = "Is this image normal? Describe what you see."
SUMMARY_ROWS = 32
SUMMARY_WIDTH = 16
_GRID = 12

F32 = NDArray[np.float32]


def _stream(label: str, n: int) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.shake_256(f"{PROBE_SEED}/{label}".encode()).digest(n), np.uint8)


def probe_pixels(size_px: int) -> NDArray[np.uint8]:
    """uint8 [size_px, size_px, 3]: coloured blocks under a diagonal ramp and noise, so that every patch differs."""
    blocks = _stream("blocks", _GRID * _GRID * 3).reshape(_GRID, _GRID, 3)
    index = np.arange(size_px) * _GRID // size_px
    image = blocks[index][:, index].astype(np.int32)
    ramp = (np.arange(size_px)[:, None] + 2 * np.arange(size_px)[None, :]) * 64 // (3 * size_px)
    noise = _stream("noise", size_px * size_px * 3).reshape(size_px, size_px, 3) >> 3
    out: NDArray[np.uint8] = np.clip(image * 5 // 8 + ramp[:, :, None] + noise, 0, 255).astype(np.uint8)
    return out


def summary_rows(n_rows: int) -> NDArray[np.int64]:
    """The rows that a summary keeps: at most SUMMARY_ROWS, first and last included."""
    return np.unique(np.linspace(0, n_rows - 1, min(n_rows, SUMMARY_ROWS)).round().astype(np.int64))


def summarise(rows: F32) -> F32:
    """[n, width] → [min(n, SUMMARY_ROWS), SUMMARY_WIDTH]: kept rows times a fixed ±1 matrix, over √width.

    Distances survive such a projection in expectation (Johnson–Lindenstrauss with Rademacher entries).
    """
    rows = np.asarray(rows, np.float32)
    width = rows.shape[1]
    bits = np.unpackbits(_stream(f"signs/{width}", (width * SUMMARY_WIDTH + 7) // 8))[: width * SUMMARY_WIDTH]
    signs = bits.reshape(width, SUMMARY_WIDTH).astype(np.float32) * 2 - 1
    out: F32 = (rows[summary_rows(rows.shape[0])] @ signs / np.float32(np.sqrt(width))).astype(np.float32)
    return out


def relative_l2(value: F32, reference: F32) -> float:
    """‖value − reference‖₂ / ‖reference‖₂ over all elements; inf where shapes differ or value is not finite."""
    if value.shape != reference.shape or not bool(np.isfinite(value).all()):
        return float("inf")
    reference64 = reference.astype(np.float64)
    norm = float(np.linalg.norm(reference64))
    return float(np.linalg.norm(value.astype(np.float64) - reference64)) / norm if norm else float("inf")
