"""Tensors that are read in pieces: from a file, from memory, and combinations that are made row by row.

    w = FileTensor("a.weight", (4096, 4096), path, offset=1024, dtype="BF16")
    w.read(0, 64)                                   # float32 [64, 4096]
    merged = LoraTensor(w, a, b, scale=2.0)         # W + scale·B@A, made for the rows that are asked for

Every class is a TensorSource (converters/checkpoint.py). A read opens its file anew: no descriptor stays open, and threads share
nothing. Knows no layouts and no names.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from numpy.typing import NDArray

from converters.checkpoint import F32, TensorSource
from edgemed.core.errors import CheckpointError
from edgemed.core.files import os_errors

# Values read at once for a mean.
_MEAN_VALUES = 1 << 22
F16_MAX = 65504.0
# Every other type holds float16 numbers, as its values or its blocks' scales.
_LARGEST = {"F32": math.inf, "BF16": 3.3895e38}
# safetensors' names of types → what numpy reads. BF16 has no numpy type: it is the upper half of a float32.
FLOAT_TYPES: dict[str, Any] = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


def read_items(path: Path, dtype: Any, count: int, offset: int) -> NDArray[Any]:
    """`count` items of `dtype` at byte `offset`. Raises CheckpointError where the file ends before."""
    with os_errors(path):
        items = np.fromfile(path, dtype, count, offset=offset)
    if items.size != count:
        raise CheckpointError(
            f"Expected {count} values at byte {offset} of {path}, found the file's end.", "Copy or download the file again."
        )
    return items


@dataclass(frozen=True)
class FileTensor:
    """A dense tensor inside a file; `dtype` is a key of FLOAT_TYPES."""

    name: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    dtype: str

    def read(self, start: int, stop: int) -> F32:
        row = math.prod(self.shape[1:])
        dtype = np.dtype(FLOAT_TYPES[self.dtype]).newbyteorder("<")
        raw = read_items(self.path, dtype, (stop - start) * row, self.offset + start * row * dtype.itemsize)
        if self.dtype == "BF16":
            bits = raw.astype(np.uint32)
            bits <<= 16  # in place: fresh memory costs more than the shift
            values = bits.view(np.float32)
        else:
            values = raw.astype(np.float32, copy=False)
        return values.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class GgufTensor:
    """A tensor inside a GGUF, dequantised with gguf's numpy code; `shape` is in numpy order."""

    name: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    type: GGMLQuantizationType

    def read(self, start: int, stop: int) -> F32:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        if len(self.shape) == 1:  # elements are blocks' contents: cut at whole blocks
            first, last = start // block * block, -(-stop // block) * block
            raw = read_items(self.path, np.uint8, (last - first) // block * block_bytes, self.offset + first // block * block_bytes)
            return self._floats(raw[None])[0, start - first : stop - first]
        row_bytes = self.shape[-1] // block * block_bytes
        inner = math.prod(self.shape[1:-1])
        raw = read_items(self.path, np.uint8, (stop - start) * inner * row_bytes, self.offset + start * inner * row_bytes)
        return self._floats(raw.reshape(-1, row_bytes)).reshape(stop - start, *self.shape[1:])

    def _floats(self, raw: NDArray[np.uint8]) -> F32:
        values: F32 = dequantize(raw, self.type)
        return values


@dataclass(frozen=True)
class ArrayTensor:
    """A small tensor that is in memory already."""

    name: str
    array: F32

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read(self, start: int, stop: int) -> F32:
        return np.array(self.array[start:stop], np.float32)


@dataclass(frozen=True)
class CallTensor:
    """A tensor whose rows a function makes (a torch tensor mapped from a pickle). `dtype` is a key of FLOAT_TYPES."""

    name: str
    shape: tuple[int, ...]
    rows: Callable[[int, int], F32]
    dtype: str = "F32"

    def read(self, start: int, stop: int) -> F32:
        return self.rows(start, stop)


@dataclass(frozen=True)
class LoraTensor:
    """base + scale · (B @ A), in float32. A is [rank, in], B is [out, rank]; both are small and kept in memory.

    `transpose` is PEFT's fan_in_fan_out: the base is stored [in, out], and so is the merged result.
    """

    base: TensorSource
    a: F32
    b: F32
    scale: float
    label: str
    transpose: bool = False

    @property
    def name(self) -> str:
        return f"{self.base.name} + {self.label}"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def read(self, start: int, stop: int) -> F32:
        left, right = (self.a.T, self.b.T) if self.transpose else (self.b, self.a)
        merged: F32 = self.base.read(start, stop) + np.float32(self.scale) * (left[start:stop] @ right)
        return merged


@dataclass(frozen=True)
class DeltaTensor:
    """base + delta, summed in float32 and rounded to float16, as LLaVA-Med's apply_delta.py leaves it.

    The base may have fewer rows and columns (a vocabulary that grew): it is then added to the top left corner.
    """

    base: TensorSource
    delta: TensorSource

    @property
    def name(self) -> str:
        return f"{self.base.name} + delta({self.delta.name})"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.delta.shape

    def read(self, start: int, stop: int) -> F32:
        out = self.delta.read(start, stop)
        last = min(stop, self.base.shape[0])
        if last > start:
            corner = (slice(0, last - start), *(slice(0, n) for n in self.base.shape[1:]))
            out[corner] += self.base.read(start, last)
        return out.astype(np.float16).astype(np.float32)


@dataclass(frozen=True)
class GrownTensor:
    """base with more rows, up to `rows`, each the mean of the base's own: as an output row it never makes the highest logit."""

    base: TensorSource
    rows: int

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, *self.base.shape[1:])

    @cached_property
    def _mean(self) -> F32:
        have = self.base.shape[0]
        step = max(1, _MEAN_VALUES // max(1, math.prod(self.base.shape[1:])))
        total = sum(self.base.read(i, min(i + step, have)).sum(0, np.float64) for i in range(0, have, step))
        mean: F32 = np.asarray(total / have, np.float32)
        return mean

    def read(self, start: int, stop: int) -> F32:
        have = self.base.shape[0]
        kept = self.base.read(min(start, have), min(stop, have))
        more = stop - max(start, have)
        return np.concatenate([kept, np.broadcast_to(self._mean, (more, *self._mean.shape))]) if more > 0 else kept


@dataclass(frozen=True)
class RopeRows:
    """Rows of q or k between HF's order and llama.cpp's for rotary pairs; whole heads are read, whatever is asked for.

    HF keeps a head's rows as two halves, llama.cpp's `llama` interleaves them: row 2i + j of a head is HF's row j·d/2 + i.
    `to_hf` is the way back.
    """

    base: TensorSource
    head_dim: int
    to_hf: bool = False

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    def read(self, start: int, stop: int) -> F32:
        d = self.head_dim
        first, last = start // d * d, -(-stop // d) * d
        return permute_heads(self.base.read(first, last), d, self.to_hf)[start - first : stop - first]


def permute_heads(rows: F32, head_dim: int, to_hf: bool = False) -> F32:
    """[heads · head_dim, …] → the same rows in llama.cpp's order, or back in HF's."""
    split = (head_dim // 2, 2) if to_hf else (2, head_dim // 2)
    return np.ascontiguousarray(rows.reshape(-1, *split, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape))


def read_checked(tensor: TensorSource, start: int, stop: int, kind: str, hint: str) -> F32:
    """Rows start:stop, which a type called `kind` is to hold. Raises CheckpointError for NaN, infinity and what that type cannot hold."""
    with np.errstate(over="ignore", invalid="ignore"):  # told below, by the tensor's name
        values = tensor.read(start, stop)
    # Two reductions without a temporary; both carry NaN along.
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise CheckpointError(f"Expected finite weights, found NaN or infinity in '{tensor.name}'.", "Use an undamaged checkpoint.")
    most = _LARGEST.get(kind, F16_MAX)
    if max(-low, high) > most:
        raise CheckpointError(f"Expected weights within ±{most:.6g} for {kind}, found {max(-low, high):.3g} in '{tensor.name}'.", hint)
    return values


def read_all(tensor: TensorSource) -> F32:
    """The whole tensor; for small ones."""
    return tensor.read(0, tensor.shape[0])
