"""tokenizer.model: sentencepiece's ModelProto, of which the pieces and two settings matter here.

    model = load_sentencepiece(path)
    model.pieces[5]                    # ("▁the", 1, -2.0): text, type as in gguf.TokenType, score

A few lines of protobuf instead of the library, which a base install does not have.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import TokenType

from edgemed.core.errors import UnsupportedError
from edgemed.core.files import os_errors

_BPE = 2  # TrainerSpec.model_type; 1 is unigram


@dataclass(frozen=True)
class SentencePiece:
    """Pieces by id, and whether text gets a blank in front (add_dummy_prefix)."""

    pieces: dict[int, tuple[str, int, float]]
    leading_blank: bool


def load_sentencepiece(path: Path) -> SentencePiece:
    """Raises ValueError, IndexError or KeyError for a damaged file, UnsupportedError for a model that is no BPE."""
    with os_errors(path):
        raw = path.read_bytes()
    pieces: dict[int, tuple[str, int, float]] = {}
    kind, blank = 1, True
    for number, value in _fields(raw):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces[len(pieces)] = (piece[1].decode("utf-8"), int(piece.get(3, TokenType.NORMAL)), score)
        elif number == 2:
            kind = dict(_fields(value)).get(3, kind)
        elif number == 3:
            blank = dict(_fields(value)).get(3, 1) != 0
    if not pieces:
        raise ValueError("no pieces")
    if kind != _BPE:
        raise UnsupportedError(
            f"Expected a BPE model in {path}, found sentencepiece's type {kind}.", "llama.cpp merges by score; only BPE converts."
        )
    return SentencePiece(pieces, blank)


def _fields(raw: bytes) -> Iterator[tuple[int, Any]]:
    """A protobuf message's fields: varints as int, fixed and nested ones as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = raw[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(raw):
        tag = varint()
        wire = tag & 7
        if wire == 0:
            yield tag >> 3, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire}")
        size = {1: 8, 5: 4}.get(wire) or (varint() if wire == 2 else 0)
        if at + size > len(raw):
            raise ValueError("cut short")
        at += size
        yield tag >> 3, raw[at - size : at]
