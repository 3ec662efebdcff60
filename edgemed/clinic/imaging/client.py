"""The program's end of the decoding process: start it, ask it, and turn its death into a DicomError.

    header = load(data, name)                   # Header
    frame = decode(data, name, index)           # Frame

One process serves the whole program, one request at a time; it is started when a DICOM file is first opened (about half a second), and
again after it died. pydicom is never imported here.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from edgemed.clinic.imaging.header import Header
from edgemed.clinic.imaging.limits import REQUEST_LIMIT_S, SCAN_LIMIT_S, STRIP_LIMIT_S
from edgemed.clinic.imaging.window import VoiLut
from edgemed.clinic.imaging.wire import read_message, write_message
from edgemed.clinic.records import Window
from edgemed.core.errors import DicomError, MissingExtraError
from edgemed.core.text import one_line

# The program's own search path, given as an argument: with `-m` or a bare `-c` a file in the current folder could pass for a library.
_CODE = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from edgemed.clinic.imaging.worker import main; main()"
_TYPES = ("uint8", "int16", "uint16", "int32", "float32")
_AGAIN = "Export the image again, or ask who sent it."


@dataclass(frozen=True)
class Frame:
    """A decoded frame: grey values after the modality LUT, or RGB. `padding` is the range of values that are no image."""

    values: NDArray[Any]
    monochrome: bool
    windows: tuple[Window, ...] = ()
    voi_lut: VoiLut | None = None
    low: float = 0.0
    high: float = 255.0
    padding: tuple[float, float] | None = None
    inverse: bool = False


class _Gone(Exception):
    """The process ended before it answered; True where it was ended because it took too long."""


class DecodingProcess:
    """One process that runs `worker.main`."""

    def __init__(self) -> None:
        path = json.dumps([p for p in sys.path if p])
        env = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CODE, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env
        )
        self.loaded: object = None

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def call(self, request: dict[str, Any], payload: bytes, limit_s: float) -> tuple[dict[str, Any], bytes]:
        """One request and its reply. Raises _Gone."""
        late = threading.Event()

        def end() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s, end)
        timer.daemon = True
        timer.start()
        reply = None
        try:
            write_message(cast(BinaryIO, self._process.stdin), request, payload)
            reply = read_message(cast(BinaryIO, self._process.stdout))
            return reply
        except (OSError, EOFError, ValueError):
            raise _Gone(late.is_set()) from None
        finally:
            timer.cancel()
            if reply is None:  # an interruption, too: the rest of its reply would be taken for the next one's
                self.close()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


_lock = threading.RLock()
_process: DecodingProcess | None = None


def close() -> None:
    """End the decoding process, where one runs: the program is locked or ends, and no image stays in another process's memory."""
    global _process
    with _lock:
        if _process is not None:
            _process.close()
        _process = None


atexit.register(close)


def load(data: bytes, name: str, token: object) -> Header:
    """What a file says before it is decoded; `token` stands for the file from then on. Raises DicomError, MissingExtraError."""
    with _lock:
        reply, _ = _ask({"op": "load"}, data, name)
        if _process is not None:
            _process.loaded = token
    try:
        return Header.of(reply["header"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DicomError(f"Expected a description of {name}, found a reply that is none.", _AGAIN) from error


def decode(data: bytes, name: str, index: int, token: object) -> Frame:
    """One frame; the file is sent again where the process holds another one. Raises DicomError, MissingExtraError."""
    with _lock:
        if _process is None or not _process.alive or _process.loaded is not token:
            load(data, name, token)
        reply, payload = _ask({"op": "frame", "options": {"index": index}}, b"", name)
    try:
        return _frame(reply, payload)
    except (KeyError, TypeError, ValueError) as error:
        raise DicomError(f"Expected pixels of {name}, found a reply that is none.", _AGAIN) from error


def _ask(request: dict[str, Any], payload: bytes, name: str, limit_s: float = REQUEST_LIMIT_S) -> tuple[dict[str, Any], bytes]:
    """A reply that is no refusal. Raises DicomError, MissingExtraError."""
    global _process
    if importlib.util.find_spec("pydicom") is None:
        raise MissingExtraError.of("Reading DICOM", "clinic")
    with _lock:
        if _process is None or not _process.alive:
            _process = DecodingProcess()
        try:
            reply, data = _process.call(request, payload, limit_s)
        except _Gone as gone:
            close()
            found = f"one that takes longer than {limit_s:g} s" if gone.args[0] else "one on which the decoder breaks down"
            raise DicomError(f"Expected a DICOM image that can be decoded in {name}, found {found}.", _AGAIN) from None
    if reply.get("extra"):
        raise MissingExtraError.of("Reading this compressed DICOM image", "clinic")
    if "expected" in reply:
        raise DicomError(f"Expected {reply['expected']} in {name}, found {reply['found']}.", str(reply["hint"]))
    return reply, data


def _frame(reply: dict[str, Any], payload: bytes) -> Frame:
    told, shape = reply["frame"], tuple(int(n) for n in reply["shape"])
    if reply["dtype"] not in _TYPES or len(shape) != (2 if told["monochrome"] else 3):
        raise ValueError("not an image")
    lut = told["voi_lut"]
    return Frame(
        values=np.frombuffer(payload, reply["dtype"]).reshape(shape),
        monochrome=told["monochrome"],
        windows=tuple(Window(**window) for window in told["windows"]),
        voi_lut=VoiLut(lut["first"], lut["bits"], tuple(lut["entries"])) if lut else None,
        low=told["low"],
        high=told["high"],
        padding=tuple(told["padding"]) if told["padding"] else None,
        inverse=told["inverse"],
    )


def scan(path: Path) -> dict[str, Any]:
    """An image's place in its series, from its header: study, series, number, modality, description, instance, position."""
    reply, _ = _ask({"op": "scan", "options": {"path": str(path)}}, b"", one_line(path.name), SCAN_LIMIT_S)
    told = reply["scan"]
    assert isinstance(told, dict)
    return told


def strip(data: bytes, name: str, key: bytes, masks: list[list[float]]) -> bytes:
    """The de-identified copy of a file; masks as parts of width and height. Raises DicomError, MissingExtraError."""
    with _lock:
        if _process is not None:
            _process.loaded = None
        _, copy = _ask({"op": "strip", "options": {"key": key.hex(), "masks": masks}}, data, name, STRIP_LIMIT_S)
    return copy
