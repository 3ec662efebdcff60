"""Requests that are answered together and by themselves, so that their answers never depend on what else was asked, or when.

A batch's make-up changes the last bits of what llama.cpp computes, and so, now and then, a word. A group begins with an empty cache, idle
slots, all its images encoded and all its requests at once, and nothing is begun beside it: the same group gives the same answers, token for
token, whatever else is asked. Evaluation asks one group an image.

So groups and other requests take turns, in order of arrival: a group waits until all that came before it has ended, and what comes after it
waits until the group has. Neither starves, however many of the other kind keep coming. Knows neither the queue nor the cache: scheduler.py
has both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgemed.core.errors import EdgemedError
from runtimes.messages import Collected, Failed, Finished, Request, Token


@dataclass(frozen=True)
class Group:
    """Requests that have arrived as one frame."""

    id: int
    received: float
    requests: Sequence[Request]


@dataclass
class _Open:
    """The group that is being answered: its frame's id, and what came so far for each request."""

    id: int
    # Of its first request's job; the others' go down from it.
    first: int
    tokens: list[list[Token]]
    ended: dict[int, Collected | EdgemedError] = field(default_factory=dict)


class Groups:
    """The group that is being answered. A member's job has a negative id, so that it is never taken for a frame's."""

    def __init__(self, send: Callable[[int, object], None]) -> None:
        self._send = send
        self._open: _Open | None = None
        self._next = -1  # never given twice: what is late of an ended group is nobody else's

    @property
    def answering(self) -> bool:
        """Whether a group is open."""
        return self._open is not None

    def open(self, group: Group) -> list[tuple[int, Request]]:
        """Begin a group of at least one request; returns the requests under their jobs' ids."""
        self._open = _Open(group.id, self._next, [[] for _ in group.requests])
        self._next -= len(group.requests)
        return [(self._open.first - index, request) for index, request in enumerate(group.requests)]

    def members(self, id: int) -> range:
        """The jobs' ids of frame `id`, where that is the open group."""
        group = self._open
        return range(group.first, group.first - len(group.tokens), -1) if group is not None and group.id == id else range(0)

    def send(self, id: int, reply: object) -> None:
        """A reply on its way out: a member's is kept until all have ended, any other goes on."""
        if id >= 0:
            return self._send(id, reply)
        if self._open is None or id > self._open.first:
            return  # of a group that has ended
        group, index = self._open, self._open.first - id
        if isinstance(reply, Token):
            group.tokens[index].append(reply)
        elif isinstance(reply, Finished):
            tokens = group.tokens[index]
            logprobs = tuple(token.logprob for token in tokens if token.logprob is not None)
            group.ended[index] = Collected(reply, tuple(token.id for token in tokens), logprobs)
        elif isinstance(reply, Failed):
            group.ended[index] = reply.error
        if len(group.ended) == len(group.tokens):
            self._open = None
            self._send(group.id, [group.ended[k] for k in range(len(group.tokens))])
