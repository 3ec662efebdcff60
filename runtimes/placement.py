"""Which slot a request gets, and what the key-value cache keeps: prefixes are shared, old conversations give way.

    placement = Placement(llm, slots, limit=2048)
    placement.place(job)        # "placed", "later" (a prefix is just being filled in) or "full" (wait for another to end)

A slot keeps its cells when its answer ends. The next request starts from the longest prefix that any slot holds, for nothing: the
cache is unified, so a second sequence can point at the first one's cells. Knows no batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from runtimes.jobs import Job, Slot
from runtimes.prompt import common_prefix

# A request waits for another that is just filling in a prefix they share, if that saves at least so many cells.
SHARE_CELLS = 16

Placed = Literal["placed", "later", "full"]


class Cache(Protocol):
    """What is needed of libllama.LanguageModel."""

    kv_tokens: int
    # Whether a sequence may begin with cells of another, or of its own past.
    reuses: bool

    def forget(self, sequence: int, start: int) -> None:
        """Drop cells from `start` on."""

    def share(self, source: int, target: int, stop: int) -> None:
        """Let `target` see `source`'s cells below `stop`."""


class Placement:
    """The slots of one cache."""

    def __init__(self, cache: Cache, slots: Sequence[Slot], limit: int) -> None:
        """`limit`: cells that one sequence may have."""
        self._cache, self._slots, self._limit = cache, slots, limit

    def place(self, job: Job) -> Placed:
        """Give the job a slot and whatever prefix is there, if there is room for its longest answer."""
        idle = [slot for slot in self._slots if slot.job is None]
        if not idle:
            return "full"
        cells = job.prompt.cells
        if not self._cache.reuses:
            target = min(idle, key=lambda slot: slot.last_used)
            if not self._make_room(job, target, target, 0):
                return "full"
            self.clear(target)
            target.start(job, 0, self._limit)
            return "placed"
        best = max(self._slots, key=lambda slot: common_prefix(slot.cells, cells))
        # The last cell is run again in any case, for its logits.
        shared = min(common_prefix(best.cells, cells), len(cells) - 1)
        if any(_soon_shared(slot, cells) >= shared + SHARE_CELLS for slot in self._slots):
            return "later"
        # Keep a conversation's end where another slot is free: its next question will want it.
        target = best if best.job is None and shared == len(best.cells) else min(idle, key=lambda slot: slot.last_used)
        if not self._make_room(job, target, best, shared):
            return "full"
        if target is best:
            self._cut(target, shared)
        else:
            self.clear(target)
            if shared:
                self._cache.share(best.index, target.index, shared)
                target.add(cells[:shared], best.places[:shared])
        target.start(job, shared, self._limit)
        return "placed"

    def keep(self, slot: Slot, job: Job) -> int:
        """Cut a slot back to what an evaluation can begin with, all before the positions it wants; returns how many cells."""
        cells = job.prompt.cells
        shared = 0 if job.all_positions or not self._cache.reuses else max(0, min(common_prefix(slot.cells, cells), len(cells) - job.last))
        self._cut(slot, shared)
        return shared

    def clear(self, slot: Slot) -> None:
        """Forget a slot's cells."""
        self._cut(slot, 0)

    def _cut(self, slot: Slot, length: int) -> None:
        if len(slot.cells) > length or length == 0:
            self._cache.forget(slot.index, length)
            slot.cut(length)

    def _make_room(self, job: Job, target: Slot, source: Slot, shared: int) -> bool:
        """Whether room for the whole answer could be made, by dropping idle slots' cells, oldest first."""
        others = [slot for slot in self._slots if slot is not target]
        need = job.longest(self._limit) + sum(slot.reserved for slot in others if slot.job)
        if need > self._cache.kv_tokens:
            return False
        kept = sorted((slot for slot in others if slot.job is None and slot is not source), key=lambda slot: slot.last_used)
        # Of an idle source, only what is not shared takes room of its own.
        tail = len(source.cells) - shared if source.job is None and source is not target else 0
        while kept and need + tail + sum(len(slot.cells) for slot in kept) > self._cache.kv_tokens:
            self.clear(kept.pop(0))
        if tail and need + tail > self._cache.kv_tokens:
            self._cut(source, shared)
        return True


def _soon_shared(slot: Slot, cells: list[int]) -> int:
    """How long a prefix of `cells` this slot will hold once its prompt is filled in; 0 if it is."""
    if slot.job is None or not slot.filling:
        return 0
    return common_prefix(slot.job.prompt.cells, cells)
