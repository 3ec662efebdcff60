"""Memory and power over time, read by a process of its own, so that what is measured does not wait for its measuring.

    with sampled(os.getpid()) as samples:
        …
    samples.all                      # [Sample(at_s=…, …), …], times as time.monotonic() gives them

`python -c` of this module is the sampler: it writes one JSON line a reading until its input ends. The process tree it watches is that
of the process it is given, itself left out.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from edgemed.core.children import own_command, own_environment
from edgemed.core.errors import EdgemedError
from runtimes.memory import measure_memory, read_board_power, read_system_used

# Reading a process's pages takes milliseconds and stops it from mapping more: at 0.02 s two decoding threads lost half their speed.
INTERVAL_S = 0.2


@dataclass(frozen=True)
class Sample:
    """One reading. Bytes of the process tree, of the whole GPU, of the whole machine; watts. None: not to be had here."""

    at_s: float
    rss: int
    pss: int | None
    anonymous: int | None
    # Of `pss`, pages of mapped files: a model's weights, and libraries.
    mapped: int | None
    gpu_process: int | None
    gpu_used: int | None
    system_used: int | None
    power_w: float | None


@dataclass
class Samples:
    """What the sampler has sent so far."""

    all: list[Sample] = field(default_factory=list)

    def between(self, start_s: float, end_s: float) -> list[Sample]:
        """Readings of a span; the nearest before it where none falls into it."""
        inside = [s for s in self.all if start_s <= s.at_s <= end_s]
        return inside or [s for s in self.all if s.at_s < start_s][-1:]


def take(pid: int, own: int, device: int) -> Sample:
    """Read everything once."""
    at = time.monotonic()
    report = measure_memory(pid, device, leave_out=own)
    mapped = None if report.pss_bytes is None or report.anonymous_bytes is None else max(0, report.pss_bytes - report.anonymous_bytes)
    gpu = report.device_process_bytes, report.device_used_bytes
    power = read_board_power(device)
    return Sample(at, report.rss_bytes, report.pss_bytes, report.anonymous_bytes, mapped, *gpu, read_system_used(), power)


@contextmanager
def sampled(pid: int, device: int = 0, interval_s: float = INTERVAL_S) -> Iterator[Samples]:
    """Readings while the block runs. Raises EdgemedError where the sampler cannot start."""
    command = own_command("bench.sampler", pid, device, interval_s)
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=own_environment())
    assert process.stdin is not None and process.stdout is not None
    out, samples = process.stdout, Samples()

    def read() -> None:
        samples.all += (Sample(**json.loads(line)) for line in out)

    first = out.readline()  # before anything is measured
    if not first:
        process.wait()
        raise EdgemedError("Expected the memory sampler to start, found that it ended.", "Report this as a fault of edgemed.")
    samples.all.append(Sample(**json.loads(first)))
    reader = threading.Thread(target=read, name="samples", daemon=True)
    reader.start()
    try:
        yield samples
    finally:
        process.stdin.close()
        reader.join()
        process.wait()
        out.close()


def main() -> None:
    """The sampler's process: PID, GPU and interval as arguments; ends with its standard input."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's Ctrl-C reaches it too, and is the parent's to handle
    pid, device, interval_s = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    ended = threading.Event()

    def wait_for_end() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait_for_end, daemon=True).start()
    while True:
        print(json.dumps(asdict(take(pid, os.getpid(), device))), flush=True)
        if ended.wait(interval_s):
            return
