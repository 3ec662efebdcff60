"""What this machine has of cores, and how its C library gives out memory. Knows no engine."""

from __future__ import annotations

import ctypes
import os
import sys

import psutil

# glibc's mallopt: where blocks begin to be mapped apart (32 MiB is the most it takes), and how much freed memory it keeps.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable))


def keep_freed_memory() -> bool:
    """Have glibc reuse large blocks instead of mapping new ones, whose pages the system must clear first; whether it will.

    An image's rows go through several buffers of megabytes: about 2,700 page faults an image became about 900 on a CPU; not measured
    on a GPU yet (docs/LOG.md, 2026-11-22). Costs some main memory, so it is for engines whose model lies on a GPU.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and mallopt(_MMAP_THRESHOLD, 32 << 20) == 1 and mallopt(_TRIM_THRESHOLD, 256 << 20) == 1
