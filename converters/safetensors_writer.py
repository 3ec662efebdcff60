"""Safetensors written piece by piece: no tensor is ever whole in memory.

    write_weights(folder, {"lm_head.weight": source}, advance=bar)

Each tensor keeps the type that it has at its source, so that nothing is lost; what was merged or made is float32, and what comes out
of quantised blocks is float16 (a few thousandths of the error that the blocks already have). Files of at most SHARD_BYTES, with an
index where there are several, as transformers reads them. The format: 8 bytes of length, a JSON header, data
(https://github.com/huggingface/safetensors#format). Knows no names of layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

from converters.checkpoint import F32, TensorSource
from converters.tensors import CallTensor, DeltaTensor, FileTensor, GgufTensor, GrownTensor, RopeRows, read_checked
from edgemed.core.files import os_errors

SHARD_BYTES = 5_000_000_000
PIECE_VALUES = 1 << 22
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_GGUF = {GGMLQuantizationType.F32: "F32", GGMLQuantizationType.BF16: "BF16"}


def stored_type(tensor: TensorSource) -> str:
    """F32, F16 or BF16: see the module."""
    if isinstance(tensor, FileTensor | CallTensor):
        return tensor.dtype if tensor.dtype in ITEM_BYTES else "F32"
    if isinstance(tensor, GgufTensor):
        return _GGUF.get(tensor.type, "F16")
    if isinstance(tensor, RopeRows | GrownTensor):
        return stored_type(tensor.base)
    return "F16" if isinstance(tensor, DeltaTensor) else "F32"


def count_bytes(tensor: TensorSource) -> int:
    """What the tensor takes in a file."""
    return prod(tensor.shape) * ITEM_BYTES[stored_type(tensor)]


def write_weights(folder: Path, tensors: Mapping[str, TensorSource], advance: Callable[[int], None]) -> list[str]:
    """model.safetensors, or shards with an index, in `folder`; names of the files. `advance` is told of every byte written.

    Raises CheckpointError for weights that are no numbers.
    """
    shards: list[dict[str, TensorSource]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + count_bytes(tensor) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += count_bytes(tensor)
    single = len(shards) == 1
    names = ["model.safetensors"] if single else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        with os_errors(folder / name), (folder / name).open("wb") as file:
            _write_file(file, shard, advance)
    if not single:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": sum(map(count_bytes, tensors.values()))}, "weight_map": where}
        with os_errors(folder):
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
    return names


def _write_file(file: BinaryIO, tensors: Mapping[str, TensorSource], advance: Callable[[int], None]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + count_bytes(tensor)
        header[name] = {"dtype": stored_type(tensor), "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        kind, rows = stored_type(tensor), tensor.shape[0]
        step = max(1, PIECE_VALUES // max(1, prod(tensor.shape[1:])))
        for start in range(0, rows, step):
            values = read_checked(tensor, start, min(start + step, rows), kind, "Convert to GGUF instead, with --quant BF16.")
            piece = encode(values, kind).tobytes()
            file.write(piece)
            advance(len(piece))


def encode(values: F32, kind: str) -> NDArray[np.generic]:
    """float32 in a type's own little-endian bytes; bfloat16 by rounding to the nearest, ties to even."""
    if kind == "F32":
        return values.astype("<f4")
    if kind == "F16":
        return values.astype("<f2")
    bits = values.astype("<f4").view("<u4")
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype("<u2")
