"""GGUF metadata as values: key → value with its GGUF type, before anything is written.

    metadata: Metadata = {"general.name": text("demo"), "clip.vision.block_count": u32(12), "clip.vision.image_mean": f32s([0.5] * 3)}

`llm_metadata` and `tokenizer_metadata` return such a table, `write_gguf` (writer.py) takes one. Knows no keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFValueType


@dataclass(frozen=True)
class Value:
    """A value and its GGUF type; `item` is the type of an array's elements."""

    value: Any
    type: GGUFValueType
    item: GGUFValueType | None = None


Metadata = dict[str, Value]


def u32(value: int) -> Value:
    return Value(int(value), GGUFValueType.UINT32)


def f32(value: float) -> Value:
    return Value(float(value), GGUFValueType.FLOAT32)


def boolean(value: bool) -> Value:
    return Value(bool(value), GGUFValueType.BOOL)


def text(value: str) -> Value:
    return Value(value, GGUFValueType.STRING)


def i32s(values: Sequence[int]) -> Value:
    return Value([int(v) for v in values], GGUFValueType.ARRAY, GGUFValueType.INT32)


def f32s(values: Sequence[float]) -> Value:
    return Value([float(v) for v in values], GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def texts(values: Sequence[str]) -> Value:
    return Value(list(values), GGUFValueType.ARRAY, GGUFValueType.STRING)
