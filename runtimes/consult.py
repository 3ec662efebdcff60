"""From a conversation about images to a request that fits the context, and from the engine's events to an answer: `ask` and `chat`.

    consultation = Consultation("Is there a fracture?", images=(prepared,), history=(Exchange("What is shown?", "A wrist.", (prepared,)),))
    planned = plan_request(engine, consultation, max_tokens=256)      # planned.dropped: exchanges left out for want of room
    answer = follow(engine.submit(planned.request), engine.artifact.manifest.template, show=print)

An image stands in the first turn that speaks of it and is not repeated, so that a follow-up finds the engine's cache as it left it. Where
the context is too short, the oldest exchanges go, question and answer together, and images that the question is about move up. Knows no
screen, no store and no llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgemed.core.calibration import score_of
from edgemed.core.conversation import ConversationTemplate, ImageSlot, Segment, Text, Turn, clean_answer, render
from edgemed.core.errors import EdgemedError, EngineError
from edgemed.core.manifest import Artifact
from runtimes.messages import EngineSettings, EngineStats, Event, Finished, LoadReport, PreparedImage, Request, Sampling, Token

MAX_TOKENS = 256
# Of the context, kept for the answer where history could otherwise fill it: at most max_tokens.
_ANSWER_SHARE = 4


class AnswerStream(Protocol):
    """A request's events, as engine.Stream has them."""

    def __iter__(self) -> Iterator[Event]: ...

    def __next__(self) -> Event: ...

    def cancel(self) -> None: ...

    def close(self) -> None: ...


class Answering(Protocol):
    """What a conversation needs of an engine: engine.Engine has it, and so has fake.FakeEngine."""

    @property
    def artifact(self) -> Artifact: ...

    @property
    def settings(self) -> EngineSettings: ...

    @property
    def report(self) -> LoadReport: ...

    def submit(self, request: Request) -> AnswerStream: ...

    def tokenize(self, segments: Sequence[Text | ImageSlot | int]) -> list[int]: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Exchange:
    """A question that was answered before, and the images that it was about."""

    question: str
    answer: str
    images: tuple[PreparedImage, ...] = ()


@dataclass(frozen=True)
class Consultation:
    """A question about images, after what was said before."""

    question: str
    images: tuple[PreparedImage, ...] = ()
    history: tuple[Exchange, ...] = ()


@dataclass(frozen=True)
class Planned:
    """A request that fits, and how many of the oldest exchanges it leaves out."""

    request: Request
    dropped: int = 0


@dataclass(frozen=True)
class Answer:
    """What came. `text` is cleaned of stop strings and labels; with an `error` it is what came before. `score`: see core.calibration."""

    text: str
    finished: Finished | None = None
    error: EdgemedError | None = None
    score: float | None = None


def pack_pixels(pixels: NDArray[np.uint8]) -> PreparedImage:
    """What core.images.prepare made, uint8 [size, size, 3], as a request carries it."""
    return PreparedImage(pixels.tobytes(), pixels.shape[0])


def plan_request(
    engine: Answering,
    consultation: Consultation,
    sampling: Sampling | None = None,
    max_tokens: int = MAX_TOKENS,
    logprobs: bool = False,
) -> Planned:
    """The request, with as much of the history as the context holds. A question that is too long by itself is the engine's to refuse."""
    sampling = sampling or Sampling()
    dropped = _count_dropped(engine, consultation, max_tokens) if consultation.history else 0
    turns, images = lay_out(consultation, dropped)
    return Planned(Request(turns=turns, images=images, sampling=sampling, max_tokens=max_tokens, logprobs=logprobs), dropped)


def lay_out(consultation: Consultation, dropped: int = 0) -> tuple[tuple[Turn, ...], tuple[PreparedImage, ...]]:
    """Turns and all their images in order, without the `dropped` oldest exchanges."""
    turns: list[Turn] = []
    shown: list[PreparedImage] = []

    def say(text: str, images: Sequence[PreparedImage]) -> None:
        fresh = [image for index, image in enumerate(images) if image not in shown and image not in images[:index]]
        shown.extend(fresh)
        turns.append(Turn("user", text, images=len(fresh)))

    for exchange in consultation.history[dropped:]:
        say(exchange.question, exchange.images)
        turns.append(Turn("assistant", exchange.answer))
    if consultation.history:
        say(consultation.question, consultation.images)
    else:  # asked once, nothing is left out: an image that is handed over twice is seen twice
        shown.extend(consultation.images)
        turns.append(Turn("user", consultation.question, images=len(consultation.images)))
    return tuple(turns), tuple(shown)


def count_tokens(engine: Answering, turns: Sequence[Turn]) -> int:
    """Cells that the turns take in the cache, images counted in full."""
    manifest = engine.artifact.manifest
    segments: list[Segment] = render(manifest.template, turns)
    images = sum(isinstance(segment, ImageSlot) for segment in segments)
    return len(engine.tokenize(segments)) + images * (manifest.vision.image_tokens - 1)


def _count_dropped(engine: Answering, consultation: Consultation, max_tokens: int) -> int:
    # The prompt is the shorter, the more is dropped: halving finds the least that fits in a few calls, however long the history.
    context = engine.settings.context_tokens
    room = context - min(max_tokens, context // _ANSWER_SHARE)
    low, high = 0, len(consultation.history)
    while low < high:
        middle = (low + high) // 2
        if count_tokens(engine, lay_out(consultation, middle)[0]) <= room:
            high = middle
        else:
            low = middle + 1
    return low


def follow(stream: AnswerStream, template: ConversationTemplate, show: Callable[[str], None]) -> Answer:
    """Read a stream to its end; `show` gets each piece of text as it comes, without blanks before the first word."""
    pieces: list[str] = []
    logprobs: list[float] = []
    for event in stream:
        if isinstance(event, Token):
            text = event.text if pieces else event.text.lstrip()
            if event.logprob is not None:
                logprobs.append(event.logprob)
            if text:
                pieces.append(text)
                show(text)
            continue
        if isinstance(event, Finished):
            return Answer(clean_answer(template, event.text), event, score=score_of(logprobs))
        return Answer(clean_answer(template, "".join(pieces)), error=event.error)
    lost = EngineError("The engine ended an answer without a closing event.", "Ask again; report this as a fault of edgemed.")
    return Answer(clean_answer(template, "".join(pieces)), error=lost)
