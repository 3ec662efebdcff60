"""What the scheduler moves around: a job (a request with its prompt, rows and text so far) and a slot (a sequence of the cache).

Both change only in the scheduler's thread, but for `Job.cancel`. They know nothing of llama.cpp's calls.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgemed.core.errors import EngineError
from runtimes.libllama import Sampler
from runtimes.messages import Finished, FinishReason, Request, Timings, Token, Usage
from runtimes.prompt import Prompt
from runtimes.sampling import TextStream

F32 = NDArray[np.float32]

_numbers = itertools.count()


def new_places(count: int) -> list[int]:
    """Numbers for cells of the cache that are about to be written, each given once in this process."""
    return list(itertools.islice(_numbers, count))


@dataclass(eq=False, repr=False)
class Job:
    """One request (or an evaluation, or an embedding) on its way."""

    id: int
    received: float
    request: Request | None = None
    evaluate: bool = False
    embed: bool = False
    all_positions: bool = False
    # Of an evaluation: how many positions at the end are wanted, where not all are; whether it may begin with cells of the one before.
    last: int = 1
    reuse: bool = False
    stop: tuple[str, ...] = ()
    stop_ids: frozenset[int] = frozenset()
    prompt: Prompt = field(default_factory=lambda: Prompt([], ()))
    # Embeddings by image hash, and the hashes still being encoded.
    rows: dict[str, F32] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    encode_s: float = 0.0
    sampler: Sampler | None = None
    cached: int = 0
    drawn: int = 0
    admitted: float | None = None
    first: float | None = None
    latest: float | None = None
    limit: int = 0
    _cancelled_after: int | None = None
    _fresh: str = ""

    def __post_init__(self) -> None:
        self.text = TextStream(self.stop)

    @property
    def in_group(self) -> bool:
        """Whether it is a group's (groups.py)."""
        return self.id < 0

    def cancel(self) -> None:
        """Called from another thread; the scheduler looks before each step and each draw."""
        if self._cancelled_after is None:
            self._cancelled_after = self.drawn

    @property
    def cancelled(self) -> bool:
        return self._cancelled_after is not None

    def longest(self, limit: int) -> int:
        """Cells of the prompt and the longest answer."""
        return min(len(self.prompt.cells) + (self.request.max_tokens if self.request else 0), limit)

    def take(self, token: int, piece: bytes, end: bool, full: bool, now: float) -> FinishReason | None:
        """Count a drawn token and its text; returns why the answer ends with it, if it does."""
        if self.first is None:
            self.first = now
        self.latest = now
        self.drawn += 1
        self._fresh = "" if end or token in self.stop_ids else self.text.push(piece)
        reason: FinishReason | None = None
        ends = self.request is None or not self.request.ignore_end
        if end and ends:
            reason = "end"
        elif ends and (token in self.stop_ids or self.text.stopped):
            reason = "stop"
        elif full or (self.request is not None and self.drawn >= self.request.max_tokens):
            reason = "length"
        if reason is not None:
            self._fresh += self.text.flush()
        return reason

    def event(self, token: int, last: bool, logprob: float | None) -> Token:
        """The event of the token that was taken last."""
        return Token(self._fresh, token, self.drawn - 1, logprob)

    def finished(self, reason: FinishReason) -> Finished:
        """The closing event."""
        now = time.monotonic()
        first, latest, admitted = self.first or now, self.latest or now, self.admitted or now
        decode_s = latest - first
        usage = Usage(
            prompt_tokens=len(self.prompt.cells),
            image_tokens=sum(cell < 0 for cell in self.prompt.cells),
            cached_tokens=self.cached,
            new_tokens=self.drawn,
            late_tokens=max(self.drawn - self._cancelled_after, 0) if self._cancelled_after is not None else 0,
        )
        timings = Timings(
            queue_s=max(admitted - self.received - self.encode_s, 0.0),
            encode_s=self.encode_s,
            prefill_s=first - admitted,
            first_token_s=first - self.received,
            decode_s=decode_s,
            decode_tokens_per_s=(self.drawn - 1) / decode_s if decode_s > 0 else 0.0,
        )
        return Finished(self.text.text, reason, usage, timings)


@dataclass(eq=False, repr=False)
class Slot:
    """One sequence: the cells that the cache holds of it, and the job it works on."""

    index: int
    cells: list[int] = field(default_factory=list)
    # Which cell of the cache each of them is: sequences whose numbers are equal share it.
    places: list[int] = field(default_factory=list)
    job: Job | None = None
    next_token: int | None = None
    # Cells that the job may come to use.
    reserved: int = 0
    last_used: float = 0.0
    last_run: float = 0.0

    @property
    def active(self) -> Job:
        """The job; there must be one."""
        if self.job is None:
            raise EngineError(f"Slot {self.index} has no request.")
        return self.job

    @property
    def filling(self) -> bool:
        """Whether a part of the prompt is still to be run."""
        return self.next_token is None

    @property
    def wants_image(self) -> bool:
        """Whether the prompt's next cell is an image's."""
        return self.filling and self.active.prompt.cells[len(self.cells)] < 0

    def add(self, cells: Sequence[int], places: Sequence[int] | None = None) -> None:
        """Cells that were run, in places of their own where none are given."""
        self.cells += cells
        self.places += new_places(len(cells)) if places is None else places

    def cut(self, length: int) -> None:
        """Keep the first cells only."""
        del self.cells[length:], self.places[length:]

    def start(self, job: Job, cached: int, limit: int) -> None:
        """Begin a job on top of `cached` cells; `limit` as in Job.longest."""
        self.job, self.next_token = job, None
        job.cached, job.admitted = cached, time.monotonic()
        self.reserved = job.longest(limit)

    def stop(self) -> None:
        """The job has ended; the cells stay."""
        self.job, self.next_token, self.last_used = None, None, time.monotonic()

    def next_part(self, room: int, mixed: bool) -> Part:
        """What to run next: at most `room` cells of the prompt, of one kind unless `mixed`, or an answer's token whatever the room."""
        if self.next_token is not None:
            return Part(self, self.active, [self.next_token], True)
        cells, start = self.active.prompt.cells, len(self.cells)
        stop = min(start + max(room, 0), len(cells))
        if not mixed:
            stop = next((i for i in range(start, stop) if (cells[i] < 0) != (cells[start] < 0)), stop)
        return Part(self, self.active, cells[start:stop], stop == len(cells))


@dataclass(frozen=True)
class Part:
    """A slot's share of a batch for a job: the cells that are run, and whether the last one's logits are wanted."""

    slot: Slot
    job: Job
    cells: list[int]
    last: bool


class Drawn(NamedTuple):
    """A token that a slot's job has drawn: whether it is an end token, whether it fills the context, and when it came."""

    slot: Slot
    job: Job
    token: int
    logprob: float | None
    end: bool
    full: bool
    at: float
