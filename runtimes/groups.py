"""Requests that are answered together and by themselves, so that their answers never depend on what else was asked, or when.

A batch's make-up changes the last bits of what llama.cpp computes, and so, now and then, a word. A group begins with an empty cache and
idle slots and all its requests at once: the same group gives the same answers, token for token, whatever was asked before it, as long as
nothing is asked beside it. Evaluation asks one group an image. Knows no cache: scheduler.py empties it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from edgemed.core.errors import EdgemedError
from runtimes.messages import Collected, Failed, Finished, Request, Token
from runtimes.wire import SubmitGroup


@dataclass
class _Open:
    """The group that is being answered: its frame's id, and what came so far for each request."""

    id: int
    # Of its first request's job; the others' go down from it.
    first: int
    tokens: list[list[Token]]
    ended: dict[int, Collected | EdgemedError] = field(default_factory=dict)


class Groups:
    """Groups on their way through the scheduler. A member's job has a negative id, so that it is never taken for a frame's."""

    def __init__(self, send: Callable[[int, object], None]) -> None:
        self._send = send
        self._waiting: deque[tuple[int, float, SubmitGroup]] = deque()
        self._open: _Open | None = None
        self._next = -1  # never given twice: what is late of an ended group is nobody else's

    @property
    def waiting(self) -> bool:
        """Whether a group waits and none is open."""
        return bool(self._waiting) and self._open is None

    def post(self, id: int, received: float, command: SubmitGroup) -> None:
        """Take in a group. An empty one is answered at once."""
        if command.requests:
            self._waiting.append((id, received, command))
        else:
            self._send(id, [])

    def open(self) -> tuple[float, Sequence[tuple[int, Request]]]:
        """The next group's time of arrival, and its requests under their jobs' ids."""
        id, received, command = self._waiting.popleft()
        self._open = _Open(id, self._next, [[] for _ in command.requests])
        self._next -= len(command.requests)
        return received, [(self._open.first - index, request) for index, request in enumerate(command.requests)]

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
