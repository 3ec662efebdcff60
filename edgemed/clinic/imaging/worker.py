"""The decoding process: the only place where pydicom and the codecs run. Started by client.py, ends when its input does.

A damaged or hostile file may make a C library crash, or ask for any amount of memory; then this process dies and the program goes on.
It writes nothing, logs nothing (pydicom's words quote the file), leaves no core dump, and knows only one file at a time.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemed.clinic.imaging.dataset import Refused, foreign, read_dataset, read_header
from edgemed.clinic.imaging.deidentify import strip
from edgemed.clinic.imaging.frames import decode_frame
from edgemed.clinic.imaging.header import describe, describe_place
from edgemed.clinic.imaging.limits import STRIP_LIMIT_S, WORKER_MEMORY_BYTES
from edgemed.clinic.imaging.wire import read_message, write_message

if TYPE_CHECKING:
    from pydicom.dataset import Dataset


def main() -> None:
    """Answer requests until the input ends."""
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to the program's children, too
    _silence()
    _limit()
    server = Server()
    while True:
        try:
            request, payload = read_message(source)
        except (EOFError, ValueError):
            return
        _alarm(STRIP_LIMIT_S * 2)
        reply, data = server.answer(request, payload)
        _alarm(0)
        del payload
        write_message(out, reply, data)


class Server:
    """What the requests mean. Keeps the last file that was loaded."""

    def __init__(self) -> None:
        self._dataset: Dataset | None = None

    def answer(self, request: dict[str, Any], payload: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
        """A reply and its bytes; a refusal is a reply, too."""
        try:
            return getattr(self, f"_{request['op']}")(payload, **request.get("options", {}))  # type: ignore[no-any-return]
        except Refused as refused:
            return {"expected": refused.expected, "found": refused.found, "hint": refused.hint, "extra": refused.extra}, b""
        except MemoryError:
            return _refusal("an image that fits into memory", "one that needs more"), b""
        except foreign():
            return _refusal("a whole DICOM image", "a damaged one"), b""

    def _load(self, payload: bytes) -> tuple[dict[str, Any], bytes]:
        self._dataset = None
        dataset = read_dataset(payload)
        header = describe(dataset)
        self._dataset = dataset
        return {"header": header}, b""

    def _frame(self, payload: bytes, index: int) -> tuple[dict[str, Any], memoryview]:
        if self._dataset is None:
            raise Refused("a loaded file", "none")
        told, array = decode_frame(self._dataset, index)
        array = np.ascontiguousarray(array)
        return {"frame": told, "shape": array.shape, "dtype": array.dtype.name}, memoryview(array).cast("B")

    def _scan(self, payload: bytes, path: str) -> tuple[dict[str, Any], bytes]:
        return {"scan": describe_place(read_header(Path(path)))}, b""

    def _strip(self, payload: bytes, key: str, masks: list[list[float]]) -> tuple[dict[str, Any], bytes]:
        self._dataset = None
        return {}, strip(read_dataset(payload), bytes.fromhex(key), masks)


def _refusal(expected: str, found: str) -> dict[str, Any]:
    """A refusal as a reply."""
    refused = Refused(expected, found)
    return {"expected": refused.expected, "found": refused.found, "hint": refused.hint, "extra": False}


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.dup2(null, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    from pydicom import config

    config.settings.reading_validation_mode = config.IGNORE


def _limit() -> None:
    if os.name != "posix":
        return
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    none = 1 if sys.platform == "linux" and most != 0 else 0  # see clinic/store/harden.py
    resource.setrlimit(resource.RLIMIT_CORE, (none, none))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard == resource.RLIM_INFINITY or hard > WORKER_MEMORY_BYTES:
        with suppress(ValueError, OSError):  # macOS refuses any
            resource.setrlimit(resource.RLIMIT_AS, (WORKER_MEMORY_BYTES, hard))


def _alarm(seconds: float) -> None:
    # The program ends a process that takes too long; this is for one whose program has gone.
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
