"""A fake engine with the engine's surface: for tests of screens and handlers, and for `edgemed chat --fake`. Needs no model.

    engine = FakeEngine(Script(("A wrist.", "No fracture is seen."), tokens_per_s=50))
    for event in engine.submit(request): ...             # Token per word, then Finished
    FakeEngine(Script(die_after=3))                      # the fourth token never comes: EngineDiedError; the next request is answered
    FakeEngine(Script(lacks_memory=True))                # Failed(EngineMemoryError) at once

A token is a word with the blank before it. Answers come in turn and begin again after the last; they say nothing about any image. Requests
are checked as the real engine checks them. Does not import llama_cpp and starts no process.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgemed.core.conversation import TEMPLATES, ImageSlot, Text, render
from edgemed.core.errors import ContextOverflowError, EngineDiedError, EngineError, EngineMemoryError, InputError
from edgemed.core.images import ImagePreparation
from edgemed.core.manifest import Artifact, LlmRecord, Manifest, SourceRecord, VisionRecord
from runtimes.messages import (
    EngineSettings,
    EngineStats,
    Event,
    Failed,
    Finished,
    FinishReason,
    LoadReport,
    MemoryReport,
    Request,
    Timings,
    Token,
    Usage,
)

ANSWERS = (
    "This is a made-up answer of the fake engine: no model is loaded, and the image was not looked at.",
    "Another made-up answer. Load a model to ask about this image.",
)
_FAKE_BYTES = 100_000_000
# A held stream looks this often whether it was cancelled.
_HOLD_S = 0.02


@dataclass(frozen=True)
class Script:
    """What the fake engine answers, how fast, and what goes wrong. `hold`, where given, is awaited before each token after the first."""

    answers: tuple[str, ...] = ANSWERS
    tokens_per_s: float = 50.0
    # The process "dies" behind so many tokens, once; the request fails, the next one is answered.
    die_after: int | None = None
    # Every request fails for lack of memory, as on a machine that is too small.
    lacks_memory: bool = False
    # The natural logarithm that each token carries where a request asks for it.
    logprob: float = math.log(0.9)
    hold: threading.Semaphore | None = None


@dataclass
class _Counts:
    busy: int = 0
    answered: int = 0
    tokens: int = 0
    restarts: int = 0
    died: bool = False
    images: set[int] = field(default_factory=set)


def fake_artifact(size_px: int = 32, image_tokens: int = 4, context_length: int = 2048) -> Artifact:
    """A manifest without files, for an engine without a model."""
    llm = LlmRecord(
        file="none.gguf",
        arch="llama",
        quant="none",
        parameters=0,
        bits_per_weight=0.0,
        context_length=context_length,
        vocab_size=0,
        embedding_length=0,
    )
    vision = VisionRecord(file="none", tower="siglip", quant="none", parameters=0, bits_per_weight=0.0, image_tokens=image_tokens)
    manifest = Manifest(
        name="fake",
        bits=16,
        created="1970-01-01T00:00:00Z",
        tool_versions={},
        source=SourceRecord(reader="none", path="", files={}),
        llm=llm,
        vision=vision,
        files={},
        image=ImagePreparation(size_px=size_px, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        template=TEMPLATES["v1"],
        space_prefix="none",
        recipe={},
        tensors=(),
    )
    return Artifact(Path("fake"), manifest)


class FakeStream(Iterator[Event]):
    """A scripted answer's events, with engine.Stream's surface."""

    def __init__(self, events: Iterator[Event], cancelled: threading.Event) -> None:
        self._events, self._cancelled = events, cancelled

    def __next__(self) -> Event:
        return next(self._events)

    def cancel(self) -> None:
        """End with Finished("cancelled") before the next token; from any thread."""
        self._cancelled.set()

    def close(self) -> None:
        """Stop and forget."""
        self._cancelled.set()
        self._events = iter(())


class FakeEngine:
    """An engine that reads its answers from a script. `requests` holds what it was asked, for tests to look at."""

    def __init__(
        self,
        script: Script | None = None,
        artifact: Artifact | None = None,
        settings: EngineSettings | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.script = script or Script()
        self.artifact = artifact or fake_artifact()
        self.settings = settings or EngineSettings(context_tokens=self.artifact.manifest.llm.context_length)
        self.requests: list[Request] = []
        self.closed = False
        self._sleep = sleep
        self._lock = threading.Lock()
        self._counts = _Counts()

    @property
    def report(self) -> LoadReport:
        """What a loaded model would report."""
        return LoadReport(0.0, _FAKE_BYTES, 0, 0, self.settings.context_tokens, ("CPU",), "plain", "skipped", None, "fake")

    @property
    def pid(self) -> int:
        """No process: 0."""
        return 0

    def submit(self, request: Request) -> FakeStream:
        """Start a scripted answer. Raises InputError or EngineError as the real engine does."""
        self._check(request)
        with self._lock:
            if self._counts.died:
                self._counts.died, self._counts.restarts = False, self._counts.restarts + 1
            self.requests.append(request)
        cancelled = threading.Event()
        return FakeStream(self._events(request, cancelled), cancelled)

    def tokenize(self, segments: Sequence[Text | ImageSlot | int]) -> list[int]:
        """One id a word, one an image."""
        return [0 for segment in segments for _ in (segment.text.split() if isinstance(segment, Text) else (0,))]

    def stats(self) -> EngineStats:
        """Counts of what was answered."""
        with self._lock:
            c = self._counts
            return EngineStats(
                pid=0,
                slots=1,
                busy=c.busy,
                queued=0,
                kv_used_tokens=0,
                kv_size_tokens=self.settings.context_tokens,
                tokens_per_s=self.script.tokens_per_s if c.tokens else 0.0,
                total_tokens=c.tokens,
                images_encoded=len(c.images),
                embeddings_reused=0,
                model_bytes=_FAKE_BYTES,
                vision_bytes=0,
                kv_bytes=0,
                restarts=c.restarts,
                memory=MemoryReport(0, _FAKE_BYTES, _FAKE_BYTES, None, None, None),
            )

    def close(self) -> None:
        """Refuse requests from now on."""
        self.closed = True

    # -- the script ---------------------------------------------------------------------------------------------------

    def _check(self, request: Request) -> None:
        if self.closed:
            raise EngineError("The engine is closed.", "Open it again.")
        size = self.artifact.manifest.image.size_px
        if any(image.size_px != size or len(image.pixels) != size * size * 3 for image in request.images):
            raise InputError(f"Expected images of {size} × {size} px, found others.", "Prepare them for this model.")
        wanted = sum(turn.images for turn in request.turns)
        if wanted != len(request.images):
            raise InputError(
                f"Expected {wanted} image(s), as the turns count, found {len(request.images)}.", "Hand over the images of all turns."
            )
        if not request.turns or request.turns[-1].role != "user":
            raise InputError("Expected turns that end with the user's.", "Check the request.")

    def _events(self, request: Request, cancelled: threading.Event) -> Iterator[Event]:
        script, prompt = self.script, self._count_prompt(request)
        if script.lacks_memory:
            yield Failed(EngineMemoryError("The model does not fit this machine's memory.", "Close other programs."))
            return
        if prompt > self.settings.context_tokens:
            yield Failed(
                ContextOverflowError(f"Expected at most {self.settings.context_tokens} tokens, found {prompt}.", "Ask a shorter question.")
            )
            return
        text = self._next_answer(request)
        with self._lock:
            self._counts.busy += 1
        try:
            yield from self._tokens(request, text, prompt, cancelled)
        finally:
            with self._lock:
                self._counts.busy -= 1

    def _tokens(self, request: Request, text: str, prompt: int, cancelled: threading.Event) -> Iterator[Event]:
        words = text.split(" ")
        said: list[str] = []
        reason: FinishReason = "end"
        for index, word in enumerate(words):
            if index and self.script.hold is not None:
                while not (self.script.hold.acquire(timeout=_HOLD_S) or cancelled.is_set()):
                    pass
            if cancelled.is_set() or index == request.max_tokens:
                reason = "cancelled" if cancelled.is_set() else "length"
                break
            if self._dies(index):
                yield Failed(EngineDiedError("The engine's process ended while it was answering (fake).", "Ask again."))
                return
            self._sleep(1 / self.script.tokens_per_s)
            said.append(f" {word}" if index else word)
            with self._lock:
                self._counts.tokens += 1
            yield Token(said[-1], 0, index, self.script.logprob if request.logprobs else None)
        usage = Usage(prompt, sum(turn.images for turn in request.turns), 0, len(said))
        decode_s = len(said) / self.script.tokens_per_s
        yield Finished("".join(said), reason, usage, Timings(0.0, 0.0, 0.0, 0.0, decode_s, self.script.tokens_per_s))

    def _count_prompt(self, request: Request) -> int:
        manifest = self.artifact.manifest
        return len(self.tokenize(render(manifest.template, request.turns))) + len(request.images) * (manifest.vision.image_tokens - 1)

    def _next_answer(self, request: Request) -> str:
        with self._lock:
            text = self.script.answers[self._counts.answered % len(self.script.answers)]
            self._counts.answered += 1
            self._counts.images |= {hash(image) for image in request.images}
            return text

    def _dies(self, index: int) -> bool:
        with self._lock:
            dies = self.script.die_after == index and not self._counts.restarts
            self._counts.died = self._counts.died or dies
            return dies
