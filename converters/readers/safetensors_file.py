"""The header of a safetensors file: every tensor's place, checked against the file's length.

    tensors = open_safetensors(path)     # {"model.norm.weight": FileTensor(...), ...}

Reads the header only. The library `safetensors` has no bfloat16 in numpy and copies whole tensors; the format is eight bytes of
length, JSON, and data.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import TensorSource
from converters.tensors import FLOAT_TYPES, FileTensor
from edgemed.core.errors import CheckpointError, UnsupportedError
from edgemed.core.files import os_errors

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_AGAIN = "Copy or download the file again."
# Integer tensors are old buffers (position ids); they are listed with no reader of their own.
_INTEGERS = {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}


def open_safetensors(path: Path) -> dict[str, TensorSource]:
    """Floating point tensors by name. Raises CheckpointError for a file that is cut, or no safetensors file."""
    with os_errors(path):
        size = path.stat().st_size
        with path.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(f"Expected a safetensors header in {path}, found none that fits its {size} bytes.", _AGAIN)
            raw = f.read(length)
    try:
        header = json.loads(raw)
        entries = {str(k): v for k, v in header.items() if k != "__metadata__"}
        return {name: tensor for name, entry in entries.items() if (tensor := _tensor(path, name, entry, 8 + length, size)) is not None}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"Expected a safetensors header in {path}, found a damaged one ({error}).", _AGAIN) from error


def _tensor(path: Path, name: str, entry: dict[str, Any], data: int, size: int) -> TensorSource | None:
    begin, end = (int(n) for n in entry["data_offsets"])
    shape, dtype = tuple(int(n) for n in entry["shape"]), entry["dtype"]
    if not 0 <= begin <= end or data + end > size:
        raise CheckpointError(f"Expected {path} to hold tensor '{name}' up to byte {data + end}, found a file of {size} bytes.", _AGAIN)
    if dtype not in FLOAT_TYPES and dtype not in _INTEGERS:
        raise UnsupportedError(
            f"Expected tensors of {', '.join(FLOAT_TYPES)} in {path}, found {dtype} for '{name}'.",
            "Save the checkpoint in float16 or bfloat16.",
        )
    item = _INTEGERS.get(dtype) or np.dtype(FLOAT_TYPES[dtype]).itemsize
    if end - begin != math.prod(shape) * item:
        raise CheckpointError(f"Expected {math.prod(shape) * item} bytes for tensor '{name}' of {path}, found {end - begin}.", _AGAIN)
    return FileTensor(name, shape, path, data + begin, dtype) if dtype in FLOAT_TYPES else None
