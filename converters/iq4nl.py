"""IQ4_NL, quantised with numpy: ggml's search for each block's scale, five to ten times as fast as its scalar code.

    data = quantise_iq4_nl(rows)          # float32 [n, width] → uint8 [n, width / 32 · 18]

IQ4_NL stores, for 32 values, a scale and 16 levels that lie closer together around zero; the tower of a TinyLLaVA has 270 million
such values, for which `ggml_quantize_chunk` takes 90 s of a core. Here all blocks try a scale at once: the candidates are fixed
multiples of a block's largest value, so that a value's level under each is looked up by its ratio to that. The format and the
measure (squared error weighted by x²) are ggml's (ggml-quants.c, quantize_row_iq4_nl_impl); bytes can differ where two levels are
equally near. Knows nothing of importance weights: ggml has them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

BLOCK = 32
# kvalues_iq4nl of ggml-common.h.
LEVELS = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# What ggml tries: the block's largest value at ±127, and at −134 to −120.
CANDIDATES = (127.0, *(i - 127.0 for i in range(-7, 8)))
_STEPS = 1 << 12  # of a ratio's grid, to each side of zero
_FINE = 64  # of the final grid, to a unit of level
_BLOCKS = 1 << 12  # worked on at a time: half a megabyte an array, which caches hold


def _nearest(values: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """The index of the level nearest to each value."""
    return np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, values).astype(np.uint8)


@lru_cache(maxsize=1)
def _tables() -> tuple[F32, NDArray[np.uint8]]:
    """Levels by candidate and ratio [16, 2·_STEPS + 1]; level indices by scaled value, for the end."""
    ratios = np.arange(-_STEPS, _STEPS + 1, dtype=np.float32) / _STEPS
    levels = np.stack([LEVELS[_nearest(np.float32(c) * ratios)] for c in CANDIDATES])
    return levels, _nearest(np.arange(-256 * _FINE, 256 * _FINE + 1, dtype=np.float32) / _FINE)


def quantise_iq4_nl(rows: F32) -> NDArray[np.uint8]:
    """float32 [n, width], width a multiple of 32 → uint8 [n, width / 32 · 18]."""
    blocks = np.ascontiguousarray(rows, np.float32).reshape(-1, BLOCK)
    out = np.empty((blocks.shape[0], 2 + BLOCK // 2), np.uint8)
    for start in range(0, blocks.shape[0], _BLOCKS):
        part = blocks[start : start + _BLOCKS]
        scale = _best_scale(part)
        out[start : start + _BLOCKS, :2] = scale.astype("<f2")[:, None].view(np.uint8)
        index = _indices(part, scale)
        out[start : start + _BLOCKS, 2:] = index[:, : BLOCK // 2] | (index[:, BLOCK // 2 :] << 4)
    return out.reshape(rows.shape[0], -1)


def _best_scale(x: F32) -> F32:
    """[n, 32] → [n]: of all candidates' least-squares scales the one with the smallest weighted error, 0 for a block of zeros."""
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1)[:, None], axis=1)
    usable = np.abs(largest) > 1e-15  # GROUP_MAX_EPS
    ratio = x / np.where(usable, largest, 1)
    place = np.rint(ratio * _STEPS).astype(np.intp) + _STEPS
    square = ratio * ratio
    cube = square * ratio
    best = np.zeros(x.shape[0], np.float32)
    scale = np.zeros(x.shape[0], np.float32)
    level = np.empty_like(x)
    for table in _tables()[0]:
        np.take(table, place, out=level, mode="clip")
        product = np.einsum("ij,ij->i", cube, level)
        np.multiply(level, level, out=level)
        fit = product / (np.einsum("ij,ij->i", square, level) + np.float32(1e-30))  # of a block of zeros: 0
        better = product * fit > best
        best = np.where(better, product * fit, best)
        scale = np.where(better, fit, scale)
    out: F32 = np.where(usable[:, 0], scale * largest[:, 0], 0)
    return out


def _indices(x: F32, scale: F32) -> NDArray[np.uint8]:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    place = np.rint(x * (inverse * np.float32(_FINE))[:, None]).astype(np.intp) + 256 * _FINE
    out: NDArray[np.uint8] = np.take(_tables()[1], place, mode="clip")
    return out
