"""An image's rows from the tower to the model without detours, by the library that dense.py preloads (cuda/rows.h).

    tower_rows.prepare(576, 4096); out = tower_rows.memory(576, 4096)    # which a GPU copies to and from by itself
    code, fetched = tower_rows.run(out, lambda: lib.mtmd_encode_chunk(context, chunk))
    code = ModelRows().run([(1, out)], 611, 4096, lambda: lib.llama_decode(context, batch))

Without it llama.cpp copies an image's rows (10 MB of a 7 B model) seven times on their way (docs/LOG.md, 2026-11-30).
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import weakref
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]

# Beside llama_decode's codes: it did not take rows on the way that is known here.
NOT_TAKEN = -100


def pinned_images(kept_bytes: int, image_bytes: int) -> int:
    """How many images' memory is pinned: of those that are kept, the one that is being begun and the one that is being encoded."""
    return kept_bytes // image_bytes + 2


class _Rows(ctypes.Structure):
    """Rows of cuda/rows.h."""

    _fields_ = (("first", ctypes.c_int64), ("count", ctypes.c_int64), ("data", ctypes.c_void_p))


class ModelRows:
    """Images' rows among a batch of token ids, written to the GPU."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._begin, self._end = library.edgemed_rows_begin, library.edgemed_rows_end
        self._begin.argtypes, self._begin.restype = [ctypes.POINTER(_Rows), ctypes.c_int, ctypes.c_int64], None
        self._end.argtypes, self._end.restype = [], ctypes.c_int64

    def run(self, images: Sequence[tuple[int, F32]], rows: int, width: int, decode: Callable[[], int]) -> int:
        """`decode`, which runs a batch of so many ids, with these rows of it replaced: the number of the first, float32 [any, width].

        Returns its code, or NOT_TAKEN.
        """
        kept = [(first, np.ascontiguousarray(part, np.float32)) for first, part in images]
        spans = (_Rows * len(kept))(*(_Rows(first, len(part), part.ctypes.data) for first, part in kept))
        self._begin(spans, len(kept), 4 * width)
        try:
            code = decode()
        finally:
            taken = int(self._end())
        return code if code != 0 or taken == rows else NOT_TAKEN


class TowerRows:
    """A tower's rows, fetched from the GPU into memory of ours that it reaches by itself, instead of libmtmd's.

    That memory is pinned once and used again and again: pinning takes the driver's lock, which an answer's next token would wait for.
    """

    def __init__(self, kept_bytes: int) -> None:
        """`kept_bytes`: how much rows of images are kept for later questions; so much is pinned, and two images' more."""
        library = ctypes.CDLL(None)
        self._begin, self._end, self._pin = library.edgemed_fetch_begin, library.edgemed_fetch_end, library.edgemed_pin
        self._begin.argtypes, self._begin.restype = [ctypes.c_void_p, ctypes.c_size_t], None
        self._pin.argtypes, self._pin.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int
        self._kept_bytes = kept_bytes
        self._free: list[mmap.mmap] | None = None

    def prepare(self, rows: int, width: int) -> None:
        """Pin memory for images of so many rows, the first time."""
        assert sys.platform != "win32"  # the library is Linux's
        if self._free is not None:
            return
        self._free, size = [], 4 * rows * width
        for _ in range(pinned_images(self._kept_bytes, size)):
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # whole pages, of which nothing else has a part
            if self._pin(np.frombuffer(pages, np.uint8).ctypes.data, size) != 0:
                break  # the rest is as fast as it was without
            self._free.append(pages)

    def memory(self, rows: int, width: int) -> F32:
        """float32 [rows, width] of any values: pinned, where such is left."""
        free = self._free or []
        if not free or len(free[-1]) != 4 * rows * width:
            return np.empty((rows, width), np.float32)
        pages = free.pop()
        whole = np.frombuffer(pages, np.float32)
        weakref.finalize(whole, free.append, pages).atexit = False  # once no view of it is left
        return whole.reshape(rows, width)

    def run(self, out: F32, encode: Callable[[], int]) -> tuple[int, bool]:
        """`encode`'s code, and whether the rows that it fetched lie in `out` (else they are where libmtmd keeps them)."""
        self._begin(out.ctypes.data, out.nbytes)
        try:
            code = encode()
        finally:
            fetched = bool(self._end())
        return code, fetched
