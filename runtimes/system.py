"""What this machine has of cores. Knows no engine."""

from __future__ import annotations

import os

import psutil


def physical_cores() -> int:
    """Cores that this process may use, hyper-threads not counted."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable))
