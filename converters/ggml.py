"""ggml's own quantisation kernels, called in the library that the installed llama-cpp-python carries.

    data = quantise_rows(GGMLQuantizationType.Q4_K, rows)     # float32 [n, width] → uint8 [n, row_bytes]

The calls release the GIL, so threads run side by side. llama_cpp itself is not imported (that would load llama.cpp and its
backends); one of the two places of the tree that touch ctypes. Knows nothing about models or files.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from edgemed.core.errors import EngineLoadError, RecipeError

F32 = NDArray[np.float32]

_FILE_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}


def find_library() -> Path:
    """The path of ggml's base library inside the installed llama_cpp package. Raises EngineLoadError."""
    # The same variable that llama-cpp-python reads, so that both use one build.
    override = os.environ.get("LLAMA_CPP_LIB_PATH")
    spec = importlib.util.find_spec("llama_cpp")
    folders = [Path(override)] if override else [Path(p) / "lib" for p in (spec.submodule_search_locations or () if spec else ())]
    name = _FILE_NAMES.get(sys.platform, "libggml-base.so")
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    where = ", ".join(map(str, folders)) or "an installed llama-cpp-python, which is missing"
    raise EngineLoadError(f"Expected the library {name} in {where}, found none.", "Run: pip install llama-cpp-python==0.3.36")


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    path = find_library()
    try:
        library = ctypes.CDLL(str(path))
        library.ggml_quantize_chunk.restype = ctypes.c_size_t
        library.ggml_quantize_chunk.argtypes = [
            ctypes.c_int,
            ctypes.c_void_p,
            ctypes.c_void_p,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_int64,
            ctypes.c_void_p,
        ]
        library.ggml_quantize_init.restype = None
        library.ggml_quantize_init.argtypes = [ctypes.c_int]
        library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
        library.ggml_row_size.restype = ctypes.c_size_t
        library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    except (OSError, AttributeError) as error:
        raise EngineLoadError(
            f"Expected ggml's kernels in {path}, found a library without them ({error}).", "Reinstall llama-cpp-python."
        ) from error
    return library


def block_size(kind: GGMLQuantizationType) -> int:
    """How many values of a row share a block; a row's width must be a multiple of it."""
    return GGML_QUANT_SIZES[kind][0]


def bits_per_value(kind: GGMLQuantizationType) -> float:
    """Bits of storage a value, scales included: 4.5 for Q4_K."""
    block, size = GGML_QUANT_SIZES[kind]
    return 8 * size / block


def row_bytes(kind: GGMLQuantizationType, width: int) -> int:
    """Bytes of a row of `width` values. Raises RecipeError where the row is no whole number of blocks."""
    block, size = GGML_QUANT_SIZES[kind]
    if width % block:
        raise RecipeError(
            f"Expected rows that are a multiple of {block} values for {kind.name}, found {width}.", "Choose a type of block 32, or F16."
        )
    return width // block * size


def needs_importance(kind: GGMLQuantizationType) -> bool:
    """Whether ggml refuses (aborts) to quantise to this type without an importance matrix."""
    return bool(_library().ggml_quantize_requires_imatrix(int(kind)))


def prepare(kind: GGMLQuantizationType) -> None:
    """Build a type's tables once, before threads use them."""
    if int(_library().ggml_row_size(int(kind), block_size(kind))) != row_bytes(kind, block_size(kind)):
        raise EngineLoadError(
            f"Expected {kind.name} blocks as gguf describes them, found another size in ggml.",
            "Install the pinned gguf and llama-cpp-python.",
        )
    _library().ggml_quantize_init(int(kind))


def quantise_rows(kind: GGMLQuantizationType, rows: F32, importance: F32 | None = None) -> NDArray[np.uint8]:
    """float32 [n, width] → uint8 [n, row_bytes(kind, width)], by ggml's reference code. `importance` [width] weighs the columns.

    Also F32, F16 and BF16. Values must be finite (ggml asserts on some that are not): check first.
    """
    source = np.ascontiguousarray(rows, np.float32)
    n, width = source.shape
    out = np.empty((n, row_bytes(kind, width)), np.uint8)
    if n == 0:
        return out
    weights = None
    if importance is not None:
        weights = np.ascontiguousarray(importance, np.float32)
        if weights.shape != (width,):
            raise RecipeError(
                f"Expected an importance vector of {width} values, found shape {weights.shape}.", "Calibrate with this model."
            )
    pointer: int | None = weights.ctypes.data if weights is not None else None
    written = _library().ggml_quantize_chunk(int(kind), source.ctypes.data, out.ctypes.data, 0, n, width, pointer)
    if written != out.nbytes:
        raise EngineLoadError(f"Expected {out.nbytes} bytes from ggml, found {written}.", "Install the pinned llama-cpp-python.")
    return out
