"""Q4_K, Q5_K, Q6_K and IQ4_NL, quantised by compiled searches: the interface of converters/ggml.py, several times as fast.

    data = quantise_rows(GGMLQuantizationType.Q4_K, rows)     # float32 [n, width] → uint8 [n, row_bytes]

The formats are ggml's, and so is what is minimised: the squared error under the weights of its own search (named in
converters/kernels.py), which comes out equal or lower in total; bytes differ. Needs numba, which is imported, and at a machine's first
use compiles for ten to twenty seconds, when it is called; `worthwhile` says whether a job is large enough for that. Knows nothing about
models or files.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from functools import lru_cache

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from converters.ggml import row_bytes
from edgemed.core.errors import RecipeError

F32 = NDArray[np.float32]
U8 = NDArray[np.uint8]

# Below this ggml's code needs about as long as numba does to be imported and to read its compiled code back.
LEAST_VALUES = 1 << 25
# What is added to the largest level before the range of a block is divided by it: the candidates of quantize_row_q4_K_ref and
# quantize_row_q5_K_ref, and of quantize_row_q4_K_impl, which both types share.
_GRIDS = {15: np.arange(-10, 11, dtype=np.float32) / 10, 31: np.arange(-5, 11, dtype=np.float32) / 10}
_IMPORTANCE_GRID = np.arange(-18, 19, dtype=np.float32) / 20
_F16_MAX = np.float32(65504)


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether numba is installed and loads; without it ggml's own code does the same work."""
    if importlib.util.find_spec("numba") is None:
        return False
    try:
        import converters.kernels  # noqa: F401
    except (ImportError, OSError):  # numba refuses a numpy newer than it knows; llvmlite finds no library it can load
        return False
    return True


def worthwhile(values: Iterable[tuple[Type, int]]) -> bool:
    """Whether a job, given as types and numbers of values, is to be quantised here and not by ggml."""
    return sum(n for kind, n in values if kind in _KINDS) >= LEAST_VALUES and available()


def can(kind: Type) -> bool:
    """Whether there is a compiled search for this type."""
    return kind in _KINDS


def prepare(kind: Type) -> None:
    """Compile a type's search, or read it back, once, before threads use it."""
    quantise_rows(kind, np.zeros((1, 256), np.float32))


def quantise_rows(kind: Type, rows: F32, importance: F32 | None = None) -> U8:
    """float32 [n, width] → uint8 [n, row_bytes(kind, width)]. `importance` [width] weighs the columns, as in ggml.

    Values must be finite: check first. Scales beyond float16's range are cut to it.
    """
    n, width = rows.shape
    size = row_bytes(kind, width)
    # Writeable, because numba compiles anew for arrays that are not.
    flat = np.require(rows, np.float32, ["C", "W"]).reshape(-1)
    weights = np.zeros(0, np.float32) if importance is None else np.require(importance, np.float32, ["C", "W"])
    if importance is not None and weights.shape != (width,):
        raise RecipeError(f"Expected an importance vector of {width} values, found shape {weights.shape}.", "Calibrate with this model.")
    return _KINDS[kind](flat, weights).reshape(n, size)


def _half_bytes(values: F32) -> U8:
    """float32 [n] → the bytes of float16 [n, 2]."""
    return np.clip(values, -_F16_MAX, _F16_MAX).astype("<f2").view(np.uint8).reshape(-1, 2)


def _affine(rows: F32, importance: F32, top: int) -> U8:
    from converters import kernels

    blocks = rows.size // 32
    d, dmin = np.empty((2, blocks // 8), np.float32)
    steps, mins = np.empty((2, blocks), np.uint8)
    grid = _IMPORTANCE_GRID if importance.size else _GRIDS[top]
    kernels.choose_affine(rows, importance, top, grid, d, dmin, steps, mins)
    out = np.empty((blocks // 8, 144 if top == 15 else 176), np.uint8)
    out[:, :2], out[:, 2:4] = _half_bytes(d), _half_bytes(dmin)
    kernels.pack_affine(rows, d, dmin, steps, mins, top, out)
    return out


def _q4_k(rows: F32, importance: F32) -> U8:
    return _affine(rows, importance, 15)


def _q5_k(rows: F32, importance: F32) -> U8:
    return _affine(rows, importance, 31)


def _q6_k(rows: F32, importance: F32) -> U8:
    from converters import kernels

    blocks = rows.size // 16
    d = np.empty(blocks // 16, np.float32)
    steps = np.empty(blocks, np.int8)
    kernels.choose_symmetric(rows, importance, d, steps)
    out = np.empty((blocks // 16, 210), np.uint8)
    out[:, 192:208], out[:, 208:] = steps.view(np.uint8).reshape(-1, 16), _half_bytes(d)
    kernels.pack_symmetric(rows, d, steps, out)
    return out


def _iq4_nl(rows: F32, importance: F32) -> U8:
    from converters import kernels

    scale = np.empty(rows.size // 32, np.float32)
    kernels.choose_uneven(rows, importance, scale)
    out = np.empty((scale.size, 18), np.uint8)
    out[:, :2] = _half_bytes(scale)
    kernels.pack_uneven(rows, out[:, :2].copy().view("<f2")[:, 0].astype(np.float32), out)
    return out


_KINDS: dict[Type, Callable[[F32, F32], U8]] = {Type.Q4_K: _q4_k, Type.Q5_K: _q5_k, Type.Q6_K: _q6_k, Type.IQ4_NL: _iq4_nl}
