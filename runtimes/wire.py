"""How the parent and the engine's process talk: pickled frames over the process's stdin and stdout, a length before each.

Pickle can run code when it is read; it is fine here because both ends are this program, joined by a private pipe, and nothing
from outside travels but plain bytes and text. Towards the worker a frame is (id, command); back it is a list of (id, reply), so
that a burst of tokens costs one write. A reply is an Event, or whatever the command asks for, or an EdgemedError; after one that
is no Token nothing more comes to its command. (0, None) is a sign of life: something was computed.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import dataclass
from typing import BinaryIO

from edgemed.core.conversation import ImageSlot, Text
from edgemed.core.manifest import Artifact
from runtimes.messages import Buffer, EngineSettings, PreparedImage, Request

_LENGTH = struct.Struct("<Q")

# Segments as a template renders them, or token ids as they are.
Segments = tuple[Text | ImageSlot | int, ...]


@dataclass(frozen=True)
class Load:
    """First command: load this pair, or of it the language model alone. Reply: LoadReport."""

    artifact: Artifact
    settings: EngineSettings
    text_only: bool = False


@dataclass(frozen=True)
class Submit:
    """Answer a request. Replies: Token…, then Finished or Failed."""

    request: Request


@dataclass(frozen=True)
class SubmitGroup:
    """Answer requests together, from an empty cache and with nothing else beside them. Reply: a list of Collected or EdgemedError."""

    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Cancel:
    """Stop the request that has this frame's id. No reply of its own."""


@dataclass(frozen=True)
class Stats:
    """Reply: SchedulerStats."""


@dataclass(frozen=True)
class Embed:
    """Reply: float32 [image_tokens, width]."""

    image: PreparedImage


@dataclass(frozen=True)
class Evaluate:
    """Run segments alone and reply with logits, float32 [positions, vocab]: of all, or of the `last` ones.

    `reuse`: begin with the cells that the evaluation before left, as far as they are the same.
    """

    segments: Segments
    images: tuple[PreparedImage, ...]
    all_positions: bool
    last: int = 1
    reuse: bool = False


@dataclass(frozen=True)
class Tokenize:
    """Reply: list of token ids, IMAGE_TOKEN for each image."""

    segments: Segments


@dataclass(frozen=True)
class SchedulerStats:
    """The worker's part of EngineStats."""

    busy: int
    queued: int
    kv_used_tokens: int
    tokens_per_s: float
    total_tokens: int
    images_encoded: int
    embeddings_reused: int
    account: tuple[Buffer, ...] = ()


Command = Load | Submit | SubmitGroup | Cancel | Stats | Embed | Evaluate | Tokenize


def pack_frame(value: object) -> bytes:
    """One frame's content."""
    return pickle.dumps(value, pickle.HIGHEST_PROTOCOL)


def write_frame(stream: BinaryIO, data: bytes) -> None:
    """Write one packed frame. Raises OSError where the other end is gone."""
    stream.write(_LENGTH.pack(len(data)) + data if len(data) < 65536 else _LENGTH.pack(len(data)))
    if len(data) >= 65536:
        stream.write(data)
    stream.flush()


def read_frame(stream: BinaryIO) -> object | None:
    """The next frame, or None where the other end has closed or died in mid-frame."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    data = stream.read(length)
    return pickle.loads(data) if len(data) == length else None
