"""A tensor's bytes, piece by piece: read rows, check them, quantise them in threads, hand them over in order.

    for data in quantised_pieces(planned, pool, threads):
        file.write(data)

Only a few pieces are in memory at a time, whatever the tensor's size. Knows nothing about files or GGUF's layout.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from math import prod

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from converters import blocks, ggml
from converters.calibration.fit import Fit
from converters.checkpoint import F32, TensorSource
from converters.tensors import read_checked
from edgemed.core.errors import CheckpointError

# float32 values of one piece: 4 MiB, small enough for caches to help and large enough that threads rarely wait for one another.
PIECE_VALUES = 1 << 20
FLOATS = (Type.F32, Type.F16, Type.BF16)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: GGUF name, where its values come from, and as which type."""

    name: str
    source: TensorSource
    type: Type
    importance: F32 | None = None
    # How a calibrated tensor is rounded, instead of by importance alone.
    fit: Fit | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def size_bytes(self) -> int:
        *rows, width = self.shape
        return prod(rows) * ggml.row_bytes(self.type, width)


@dataclass(frozen=True)
class _Piece:
    tensor: Planned
    start: int
    stop: int


def _pieces(tensor: Planned) -> Iterator[_Piece]:
    rows = tensor.shape[0]
    if len(tensor.shape) == 1:
        yield _Piece(tensor, 0, rows)  # a row of GGUF, which must not be cut
        return
    step = max(1, PIECE_VALUES // max(1, prod(tensor.shape[1:])))
    for start in range(0, rows, step):
        yield _Piece(tensor, start, min(rows, start + step))


def quantise_piece(tensor: Planned, start: int, stop: int, compiled: bool = False) -> NDArray[np.uint8]:
    """Rows start:stop of a tensor in its type, by ggml's code or, if `compiled`, by converters/blocks.py where that has the type.

    Raises CheckpointError where a value is not finite or does not fit the type.
    """
    values = read_checked(tensor.source, start, stop, tensor.type.name, "Pass --quant BF16 or --vision-quant BF16.")
    wanted = (stop - start, *tensor.shape[1:])
    if values.shape != wanted:
        raise CheckpointError(
            f"Expected shape {wanted} for rows of '{tensor.source.name}', found {values.shape}.", "Fetch the checkpoint again."
        )
    rows = values.reshape(-1, tensor.shape[-1])
    if tensor.fit is not None and tensor.type not in FLOATS:
        return tensor.fit.round(tensor.type, rows, compiled)
    quantise_rows = blocks.quantise_rows if compiled and blocks.can(tensor.type) else ggml.quantise_rows
    return quantise_rows(tensor.type, rows, tensor.importance)


def quantised_pieces(
    tensors: Iterable[Planned], pool: Executor, in_flight: int, compiled: bool = False
) -> Iterator[tuple[Planned, NDArray[np.uint8]]]:
    """The bytes of all tensors in order, made by `pool`, at most `in_flight` pieces ahead of the consumer."""
    waiting: deque[tuple[Planned, Future[NDArray[np.uint8]]]] = deque()
    try:
        for tensor in tensors:
            for piece in _pieces(tensor):
                waiting.append((tensor, pool.submit(quantise_piece, tensor, piece.start, piece.stop, compiled)))
                if len(waiting) >= in_flight:
                    done, future = waiting.popleft()
                    yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
