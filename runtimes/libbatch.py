"""llama.cpp's batches through ctypes: of token ids, and of rows of numbers.

    batch = TokenBatch(512, max_outputs=32); n = batch.fill(positions, sequences, outputs); batch.tokens[:n] = ids
    rows = RowBatch(context, width); lib.llama_process(context, kind, rows.fill(parts, positions, sequences, outputs))

Knows no model. llama_cpp is imported before numpy (libllama.py).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp.llama_cpp
import numpy as np
from numpy.typing import NDArray

from edgemed.core.errors import EngineError

lib: Any = llama_cpp.llama_cpp

F32 = NDArray[np.float32]


class _Embedding(ctypes.Structure):
    """llama_embd: rows of an input embedding."""

    _fields_ = (("data", ctypes.c_void_p), ("n_rows", ctypes.c_size_t), ("n_embd", ctypes.c_size_t))


# Called for each row of a batch, so that the binding's checks are left out.
_add_row, _add_sequence, _set_position = (lib._lib[f"llama_batch_ext_{name}"] for name in ("add_embd", "add_seq", "set_pos"))
_add_row.argtypes, _add_row.restype = [ctypes.c_void_p, ctypes.c_int32, _Embedding], ctypes.c_int32
_add_sequence.argtypes, _add_sequence.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32], ctypes.c_bool
_set_position.argtypes, _set_position.restype = [ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p], ctypes.c_bool


class TokenBatch:
    """llama_batch over arrays of our own, filled through numpy: at most `size` pairs of a token and a sequence that it belongs to."""

    def __init__(self, size: int, max_outputs: int) -> None:
        self.size, self.max_outputs = size, max_outputs
        self.tokens = np.zeros(size, np.int32)
        self._positions = np.zeros(size, np.int32)
        self._counts = np.ones(size, np.int32)
        self._sequences = np.zeros(size, np.int32)
        self._outputs = np.zeros(size, np.int8)
        self._pointers = np.zeros(size, np.uintp)
        self.token_pointer = self.tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct = lib.llama_batch()
        self.struct.pos = self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct.n_seq_id = self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        self.struct.seq_id = self._pointers.ctypes.data_as(ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
        self.struct.logits = self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))

    def set(self, token: int, position: int, sequence: int) -> Any:
        """Of a batch of one: other numbers in the places that `fill` has set once. Returns the structure."""
        self.tokens[0], self._positions[0], self._sequences[0] = token, position, sequence
        return self.struct

    def check(self, positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]) -> tuple[int, int]:
        """(tokens, pairs) of a batch. Raises EngineError for one that llama.cpp would end the process on."""
        n, pairs = len(positions), sum(map(len, sequences))
        if not 0 < n <= pairs <= self.size or len(outputs) > self.max_outputs:
            wanted = f"1 to {self.size} tokens and at most {self.max_outputs} outputs"
            raise EngineError(f"Expected a batch of {wanted}, found {n} (in {pairs} places) and {len(outputs)}.")
        return n, pairs

    def fill(self, positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]) -> int:
        n, pairs = self.check(positions, sequences, outputs)
        self._positions[:n] = positions
        self._counts[:n] = [len(each) for each in sequences]
        self._sequences[:pairs] = [index for each in sequences for index in each]
        firsts = np.cumsum(self._counts[:n]) - self._counts[:n]
        self._pointers[:n] = self._sequences.ctypes.data + self._sequences.itemsize * firsts
        self._outputs[:n] = 0
        for index in outputs:
            self._outputs[index] = 1
        self.struct.n_tokens = n
        return n


class RowBatch:
    """llama_batch_ext, filled with embeddings from wherever they lie.

    Kept for all batches: llama.cpp makes one of every llama_batch otherwise, whose memory grows row by row (10 MB for an image of
    576 rows of 4096 values), and is given back after it.
    """

    def __init__(self, context: int, width: int) -> None:
        self._batch = lib.llama_batch_ext_init(context)
        self._row = _Embedding(None, 1, width)

    def fill(self, rows: Sequence[F32], positions: Sequence[int], sequences: Sequence[Sequence[int]], outputs: Sequence[int]) -> int:
        """The batch, which holds copies of the rows."""
        lib.llama_batch_ext_clear(self._batch)
        batch, row, places, index = self._batch, self._row, np.asarray(positions, np.int32), 0
        place = places.ctypes.data
        for part in rows:
            address, step = part.ctypes.data, part.strides[0]
            for at in range(len(part)):
                row.data = address + at * step
                together = sequences[index]
                if _add_row(batch, together[0], row) != index or not _set_position(batch, index, place + places.itemsize * index):
                    raise EngineError(f"llama.cpp refused row {index} of a batch.", "Report this as a fault of edgemed.")
                if not all(_add_sequence(batch, index, sequence) for sequence in together[1:]):
                    raise EngineError(f"llama.cpp refused the sequences of row {index}.", "Report this as a fault of edgemed.")
                index += 1
        for output in outputs:
            if not lib.llama_batch_ext_set_output_logits(batch, output, True):
                raise EngineError(f"llama.cpp refused the logits of row {output}.", "Report this as a fault of edgemed.")
        return int(batch)

    def close(self) -> None:
        lib.llama_batch_ext_free(self._batch)
