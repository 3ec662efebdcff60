"""A process that fills a GPU until only a wanted number of bytes is free, so that a smaller card's budget can be tried on a larger one.

    with Ballast(device=0, leave_bytes=5_600_000_000): ...        # raises ResourceError where less than that is free

A process of its own, as its CUDA context takes room too. Speeds measured beside it are the larger card's.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import TracebackType

from edgemed.core.children import own_command, own_environment
from edgemed.core.errors import ResourceError
from edgemed.core.units import format_bytes

_READY = b"ready"


class Ballast:
    """Holds the memory as long as the context lasts."""

    def __init__(self, device: int, leave_bytes: int) -> None:
        self._process = subprocess.Popen(
            own_command("runtimes.ballast", device, leave_bytes),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=own_environment(),
        )
        self._leave_bytes = leave_bytes

    def __enter__(self) -> Ballast:
        assert self._process.stdout is not None
        words = self._process.stdout.readline().strip()
        if words != _READY:
            self.__exit__(None, None, None)
            found = words.decode(errors="replace") or "that it could not be taken up"
            raise ResourceError(
                f"Expected a GPU with {format_bytes(self._leave_bytes)} free, to emulate a smaller one's budget, found {found}.",
                "Close other programs on the GPU, or choose --device gpu.",
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.communicate()  # closes its stdin, which ends it


def main() -> None:
    """Take what is too much, say so, and wait for the end of stdin. A GPU's number and the bytes to leave are the arguments."""
    device, leave_bytes = map(int, sys.argv[1:])
    from runtimes import libllama
    from runtimes.memory import read_gpu

    stream = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    held = [libllama.hold_gpu_memory(device, 1 << 20)]  # wakes CUDA, so that its own part is counted
    gpu = read_gpu(device)
    free = gpu.free_bytes if gpu is not None else 0
    if free < leave_bytes:
        stream.write(f"{format_bytes(free)}\n".encode())
    else:
        held.append(libllama.hold_gpu_memory(device, free - leave_bytes))
        stream.write(_READY + b"\n" if all(held) else b"that it could not be taken up\n")
    stream.flush()
    sys.stdin.buffer.read()
