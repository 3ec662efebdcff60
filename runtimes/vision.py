"""From prepared pixels to the rows that the LLM sees: the tower's self-check, its correction, the layout, a cache, a queue and a thread.

    encoder = VisionEncoder(tower, manifest)
    encoder.check(...)                      # plain or rewrite, whichever agrees with the manifest's certificate
    rows = encoder.encode(pixels)           # float32 [image_tokens, width]

llama.cpp at the pinned version puts CLIP's class token behind the patches while position embeddings and row numbers expect it in
front: every patch gets its neighbour's position, the first patch is lost, the class token takes the last place. Two index inputs
of the graph undo that: positions 1…N, 0 and rows 0…N-1. Whether a runtime needs it is measured, not assumed, so that one in which
it was repaired is left alone.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemed.core.errors import EdgemedError, EngineError, EngineLoadError
from edgemed.core.manifest import Certificate, Manifest
from edgemed.core.probe import probe_pixels, relative_l2, summarise
from runtimes.messages import VisionMode

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]

# Right after an image was encoded its prompt is begun; getting memory for the next one would be in the way.
PREPARE_AFTER_S = 0.1


class Tower(Protocol):
    """What is needed of libmtmd.VisionTower."""

    def encode(self, pixels: bytes, positions: I32 | None = None, patches: I32 | None = None) -> F32:
        """RGB bytes → float32 [patches, width]."""

    def prepare(self, rows: int) -> None:
        """Get memory for the next image's rows ready."""


def hash_image(pixels: bytes) -> str:
    """Hex SHA-256: an image's key in the cache and in prefixes (core.images.hash_pixels of the same pixels)."""
    return hashlib.sha256(pixels).hexdigest()


class VisionEncoder:
    """A tower with its mode and layout. Not safe for several threads at once."""

    def __init__(self, tower: Tower, manifest: Manifest) -> None:
        self._tower, self._record, self._size_px = tower, manifest.vision, manifest.image.size_px
        # Without a certificate to compare with, the pinned runtime's known fault is taken for granted.
        self.mode: VisionMode = "rewrite" if manifest.vision.tower == "clip" else "plain"

    def encode(self, pixels: bytes) -> F32:
        """RGB bytes of the tower's size → float32 [image_tokens, width]. Raises EngineError."""
        record, n = self._record, self._patches
        positions: I32 | None = None
        patches: I32 | None = None
        cls_row = 0
        if self.mode == "rewrite":
            positions = np.append(np.arange(1, n + 1), 0).astype(np.int32)
            patches, cls_row = np.arange(n, dtype=np.int32), n
        rows = self._tower.encode(pixels, positions, patches)
        if record.keep_cls:
            cls = self._tower.encode(pixels, positions, np.full(n, cls_row, np.int32))
            rows = np.concatenate([cls[:1], rows])
        if record.skip_first_token:
            rows = rows[1:]
        if rows.shape[0] != record.image_tokens:
            raise EngineError(f"Expected {record.image_tokens} rows for an image, found {rows.shape[0]}.", "Convert the model again.")
        rows = np.ascontiguousarray(rows)
        flat = rows.reshape(-1)
        if not math.isfinite(flat @ flat):  # in a fraction of the time that looking at each takes
            raise EngineError("Expected numbers from the vision tower, found NaN or infinity.", "Run: edgemed verify")
        return rows

    def prepare(self) -> None:
        """Get memory for the next image ready, where there is time for it."""
        self._tower.prepare(self._patches)

    @property
    def _patches(self) -> int:
        """Rows that the graph gives."""
        return self._record.image_tokens - self._record.keep_cls + self._record.skip_first_token

    def check(self, certificate: Certificate) -> float:
        """Find the mode whose probe agrees with the certificate, keep it, and return its relative L2. Raises EngineLoadError."""
        expected = certificate.expected_vision
        reference = np.asarray(expected.rows, np.float32)
        pixels = probe_pixels(self._size_px).tobytes()
        found: list[str] = []
        modes: tuple[VisionMode, ...] = ("plain", "rewrite") if self._record.tower == "clip" else ("plain",)
        for mode in modes:
            self.mode = mode
            try:
                distance = relative_l2(summarise(self.encode(pixels)), reference)
            except EngineError as error:  # this runtime's graph has no such input
                found.append(f"a failure ({error.message.rstrip('.')})")
                continue
            if distance <= expected.tolerance:
                return distance
            found.append(f"a relative distance of {distance:.2g}")
        raise EngineLoadError(
            f"Expected the vision tower to agree with the manifest's probe within {expected.tolerance:g}, found {' and '.join(found)}.",
            "Convert the model again, or install the pinned llama-cpp-python.",
        )


class EmbeddingCache:
    """Rows by image hash, least recently used first out, bounded in bytes. Used from one thread."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._rows: OrderedDict[str, F32] = OrderedDict()

    def get(self, key: str) -> F32 | None:
        """The rows kept under `key`."""
        rows = self._rows.get(key)
        if rows is not None:
            self._rows.move_to_end(key)
        return rows

    def put(self, key: str, rows: F32) -> None:
        """Keep rows, dropping old ones; rows larger than the whole cache are not kept."""
        if key in self._rows or rows.nbytes > self._limit:
            return
        self._rows[key] = rows
        self._bytes += rows.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._rows.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class Encoded:
    """An image's rows, or why there are none."""

    key: str
    rows: F32 | None
    seconds: float
    error: EdgemedError | None = None


class ImageQueue:
    """Images that wait to be encoded, by hash, in order of arrival. Used from several threads."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: dict[str, bytes] = {}
        self._taken_at: float | None = None

    def submit(self, key: str, pixels: bytes) -> None:
        """Queue an image."""
        with self._changed:
            self._waiting[key] = pixels
            self._changed.notify()

    def prefer(self, key: str) -> None:
        """Put an image that still waits in front of all others."""
        with self._changed:
            if key in self._waiting:
                self._waiting = {key: self._waiting.pop(key), **self._waiting}

    def drop(self, key: str) -> bool:
        """Take an image out again; False where it waits no more."""
        with self._changed:
            return self._waiting.pop(key, None) is not None

    def take(self, timeout_s: float | None = None) -> tuple[str, bytes] | None:
        """The next image, which waits no more; blocks until there is one, or None where there is none in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting, timeout_s):
                return None
            key = next(iter(self._waiting))
            self._taken_at = time.monotonic()
            return key, self._waiting.pop(key)

    def done(self) -> None:
        """The image that was taken has been encoded."""
        self._taken_at = None

    @property
    def busy_s(self) -> float:
        """For how long an image has been being encoded; 0 where none is."""
        since = self._taken_at
        return 0.0 if since is None else time.monotonic() - since


class EncodeThread:
    """Encodes one image of the queue after another in a thread of its own; `done` is called there with each result."""

    def __init__(self, encoder: VisionEncoder, images: ImageQueue, done: Callable[[Encoded], None], on_cpu: bool) -> None:
        self._encoder, self._images, self._done, self._on_cpu = encoder, images, done, on_cpu
        threading.Thread(target=self._run, name="encode", daemon=True).start()

    def _run(self) -> None:
        while True:
            key, pixels = self._next()
            if not self._on_cpu:
                self._encode(key, pixels)
                continue
            # A thread for each image: libgomp keeps a team of threads for every thread that ever computed, and as soon as all teams
            # together outnumber the cores, it makes all of them sleep at every meeting; decoding then runs at a third of its speed.
            worker = threading.Thread(target=self._encode, args=(key, pixels), name=f"encode {key[:8]}", daemon=True)
            worker.start()
            worker.join()

    def _next(self) -> tuple[str, bytes]:
        taken = self._images.take(None if self._on_cpu else PREPARE_AFTER_S)
        while taken is None:
            self._encoder.prepare()
            taken = self._images.take()
        return taken

    def _encode(self, key: str, pixels: bytes) -> None:
        start = time.monotonic()
        rows, fault = None, None
        try:
            rows = self._encoder.encode(pixels)
        except EdgemedError as error:
            fault = error
        self._images.done()
        self._done(Encoded(key, rows, time.monotonic() - start, fault))
