"""The runtime's own account of its memory, read from what llama.cpp and libmtmd log while they load.

    lines = Lines(); lines.add(level, text); account = read_account(lines.kept)     # (Buffer("weights", "CPU_Mapped", 85_503_744), …)

llama.cpp tells buffer sizes nowhere else in C (llama_get_memory_breakdown returns a C++ map). They are given in MiB with two
decimals, so that a buffer is known to 5 kB. libmtmd names its compute buffer at the first image. What grows later is not logged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from runtimes.messages import Buffer

MIB = 1 << 20
_ERROR = 4  # GGML_LOG_LEVEL_ERROR
_KEPT_ERRORS = 20
_LLAMA = re.compile(r"^(\w+): +(\S+) +(model|KV|output|compute) buffer size = +([\d.]+) MiB")
_TOWER_PLACE = re.compile(r"^clip_ctx: CLIP using (\S+) backend")
_TOWER_SIZE = re.compile(r"^load_hparams: model size: +([\d.]+) MiB")
_WHAT = {"model": "weights", "KV": "cache", "output": "output", "compute": "compute"}
_NO_MEMORY = re.compile(
    r"fail\w* to alloc|allocation (?:still )?failed|cannot alloc|bad_alloc|cudaMalloc|out of memory|MemoryError|not enough memory",
    re.IGNORECASE,
)


class Lines:
    """Keeps the lines of a log that tell sizes, and its last errors."""

    def __init__(self) -> None:
        self.kept: list[str] = []
        self.errors: list[str] = []

    def add(self, level: int, text: str) -> None:
        """One message; others than these are dropped."""
        if level == _ERROR:
            self.errors = [*self.errors[1 - _KEPT_ERRORS :], text.strip()]
        elif any(pattern.match(text) for pattern in (_LLAMA, _TOWER_PLACE, _TOWER_SIZE)):
            self.kept.append(text)


def read_account(lines: Iterable[str]) -> tuple[Buffer, ...]:
    """Buffers by what they are for and where, the last word on each counting; the same kind and place in one load adds up."""
    found: dict[tuple[str, str], int] = {}
    tower_place = "CPU"
    for line in lines:
        if match := _TOWER_PLACE.match(line):
            tower_place = match[1]
        elif match := _TOWER_SIZE.match(line):
            found["tower weights", tower_place] = _bytes(match[1])
        elif match := _LLAMA.match(line):
            what = "tower compute" if match[1] == "reserve_compute_meta" else _WHAT[match[3]]
            key = what, match[2]
            found[key] = _bytes(match[4]) + (found.get(key, 0) if what == "weights" else 0)
    return tuple(Buffer(what, place, size) for (what, place), size in found.items())


def _bytes(mebibytes: str) -> int:
    return round(float(mebibytes) * MIB)


def lacks_memory(words: Iterable[str]) -> bool:
    """Whether an error's words speak of memory that could not be had."""
    return any(_NO_MEMORY.search(text) for text in words)
