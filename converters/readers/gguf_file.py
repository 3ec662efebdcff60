"""A GGUF's header: metadata as Python values and every tensor's place, checked against the file's length.

    file = open_gguf(path)
    file.fields["llama.block_count"], file.tensors["token_embd.weight"].shape      # shapes in numpy order

Written here, and not taken from gguf's GGUFReader, because that one reads a damaged file as far as it goes, and takes seconds for a
vocabulary. Knows no architectures.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, Keys

from converters.tensors import GgufTensor
from edgemed.core.errors import CheckpointError, UnsupportedError
from edgemed.core.files import os_errors

MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_SCALARS = {
    GGUFValueType.UINT8: "<u1", GGUFValueType.INT8: "<i1", GGUFValueType.UINT16: "<u2", GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4", GGUFValueType.INT32: "<i4", GGUFValueType.FLOAT32: "<f4", GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "<u8", GGUFValueType.INT64: "<i8", GGUFValueType.FLOAT64: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of one file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]


class _Cursor:
    """A position in the file; every read is within it or raises struct.error, ValueError or IndexError."""

    def __init__(self, raw: mmap.mmap) -> None:
        self.raw = raw
        self.at = 0

    def scalar(self, kind: str) -> Any:
        return self.array(kind, 1)[0]

    def array(self, kind: str, count: int) -> list[Any]:
        dtype = np.dtype(kind)
        if count < 0 or self.at + count * dtype.itemsize > len(self.raw):
            raise ValueError("a value beyond the file's end")
        values = np.frombuffer(self.raw[self.at : self.at + count * dtype.itemsize], dtype)
        self.at += count * dtype.itemsize
        items: list[Any] = values.tolist()
        return items

    def text(self) -> str:
        (length,) = struct.unpack_from("<Q", self.raw, self.at)
        start = self.at + 8
        if start + length > len(self.raw):
            raise ValueError("a text beyond the file's end")
        self.at = start + length
        return self.raw[start : self.at].decode("utf-8")

    def value(self) -> Any:
        kind = GGUFValueType(self.scalar("<u4"))
        if kind is GGUFValueType.STRING:
            return self.text()
        if kind is not GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = GGUFValueType(self.scalar("<u4")), self.scalar("<u8")
        if item is GGUFValueType.STRING:
            return [self.text() for _ in range(count)]
        return self.array(_SCALARS[item], count)


def open_gguf(path: Path) -> GgufFile:
    """Header of the GGUF at `path`. Raises CheckpointError for a file that is cut, damaged or none at all."""
    with os_errors(path):
        size = path.stat().st_size
        with path.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise CheckpointError(f"Expected a GGUF file at {path}, found something else.", "Check the path, or get the file again.")
            raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    with raw:
        try:
            return _parse(path, _Cursor(raw), size)
        except (struct.error, ValueError, TypeError, KeyError, IndexError, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"Expected a whole GGUF header in {path}, found a damaged one ({error}).", "Get the file again."
            ) from error


def _parse(path: Path, cursor: _Cursor, size: int) -> GgufFile:
    cursor.at = 4
    version = cursor.scalar("<u4")
    if version not in (2, 3):
        raise CheckpointError(f"Expected GGUF version 2 or 3 in {path}, found {version}.", "Get the file again, or a newer one.")
    n_tensors, n_fields = cursor.array("<u8", 2)
    fields = {cursor.text(): cursor.value() for _ in range(n_fields)}
    infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = int(fields.get(Keys.General.ALIGNMENT, _DEFAULT_ALIGNMENT))
    if alignment < 1:
        raise ValueError(f"alignment {alignment}")
    data = -(-cursor.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in infos:
        tensors[name] = GgufTensor(name, shape, path, data + offset, kind)
        end = data + offset + _bytes(shape, kind)
        if end > size:
            raise CheckpointError(
                f"Expected {path} to hold tensor '{name}' up to byte {end}, found a file of {size} bytes.", "Get the file again."
            )
    return GgufFile(path, fields, tensors)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
    name = cursor.text()
    dimensions = cursor.scalar("<u4")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{dimensions} dimensions")
    shape = tuple(reversed(cursor.array("<u8", dimensions)))
    number, offset = cursor.scalar("<u4"), cursor.scalar("<u8")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise UnsupportedError(
            f"Expected a known tensor type for '{name}', found number {number}.", "Use a file of a common type."
        ) from error
    return name, shape, kind, offset


def _bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise ValueError(f"a row of {shape[-1]} in blocks of {block}")
    total = 1
    for n in shape:
        total *= n
    return total // block * block_bytes
