"""The engine as its users see it: a loaded artifact that answers requests, in a process of its own.

    with Engine.open(load_artifact(folder), EngineSettings()) as engine:
        for event in engine.submit(prepare_request(artifact, (Turn("user", "What is shown?", images=1),), [path])):
            ...                                       # Token…, then Finished or Failed
        answer = engine.ask("What is shown?", [path])  # collected

Safe to use from many threads. A worker that dies ends its requests with EngineDiedError and is started anew by the next call; one that
gives no sign of life for long is ended (EngineSettings.silence_limit_s).
Does not import llama_cpp; llama.cpp's own words stay in the worker's stderr, whose end is kept for error messages.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemed.core.conversation import ImageSlot, Text, Turn, clean_answer
from edgemed.core.errors import (
    ContextOverflowError,
    EdgemedError,
    EngineDiedError,
    EngineError,
    EngineLoadError,
    EngineMemoryError,
    InputError,
)
from edgemed.core.images import load_image, prepare
from edgemed.core.manifest import Artifact, verify_files
from runtimes import dense
from runtimes.account import lacks_memory
from runtimes.memory import measure_memory, read_capability
from runtimes.messages import (
    Collected,
    EngineSettings,
    EngineStats,
    Event,
    Failed,
    Finished,
    LoadReport,
    PreparedImage,
    Request,
    Sampling,
    Token,
)
from runtimes.process import Pending, WorkerProcess
from runtimes.wire import Cancel, Embed, Evaluate, Load, SchedulerStats, Stats, Submit, SubmitGroup, Tokenize

F32 = NDArray[np.float32]

# More characters than this for each token of the context never fit.
TEXT_LIMIT_PER_TOKEN = 32
LEAST_TEXT_LIMIT = 10_000
# A worker that loads is silent: for minutes where gigabytes come from a stick, or a new GPU's kernels are compiled. It has a limit all the
# same: where a GPU's driver hangs, the next worker hangs while loading, and all callers wait for it.
LOAD_SILENCE_S = 3600.0
# Signs of life are a second apart.
LEAST_SILENCE_S = 2.0
MEMORY_HINT = "Use a smaller context, fewer slots or a 4-bit model; see: edgemed plan"


def prepare_image(artifact: Artifact, image: Path) -> PreparedImage:
    """An image file as this model's tower is to see it. Raises ImageError."""
    preparation = artifact.manifest.image
    return PreparedImage(prepare(load_image(image), preparation).tobytes(), preparation.size_px)


def prepare_request(artifact: Artifact, turns: Sequence[Turn], images: Sequence[Path | PreparedImage] = (), **options: Any) -> Request:
    """A request from turns and image files; `options` are Request's other fields. Raises ImageError."""
    prepared = tuple(image if isinstance(image, PreparedImage) else prepare_image(artifact, image) for image in images)
    return Request(turns=tuple(turns), images=prepared, **options)


class Stream(Iterator[Event]):
    """A request's events. `cancel()` ends it with Finished("cancelled"); `close()` (or losing it) ends it without a word."""

    def __init__(self, worker: WorkerProcess, pending: Pending) -> None:
        self._worker, self._pending, self._ended = worker, pending, False

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        reply = self._pending.get()
        event: Event = Failed(reply) if isinstance(reply, EdgemedError) else reply  # type: ignore[assignment]
        self._ended = not isinstance(event, Token)
        return event

    def cancel(self) -> None:
        """Ask the worker to stop before the next token; from any thread. The closing event still comes."""
        if not self._ended:
            self._worker.try_send(self._pending.id, Cancel())

    def close(self) -> None:
        """Stop and forget. Not while another thread waits in `next`; use `cancel` for that."""
        if not self._ended:
            self._ended = True
            self._worker.forget(self._pending.id)
            self._worker.try_send(self._pending.id, Cancel())

    def __del__(self) -> None:
        # May run anywhere, also in a thread that holds the process's locks: it only leaves word.
        if not self._ended:
            self._ended = True
            self._worker.abandon(self._pending.id)


class Engine:
    """One model, loaded. Use `Engine.open`."""

    def __init__(self, artifact: Artifact, settings: EngineSettings, text_only: bool = False) -> None:
        self.artifact, self.settings, self._text_only = artifact, settings, text_only
        self._lock = threading.Lock()
        self._closed = False
        self._restarts = 0
        self._process, self._report = self._start()

    @classmethod
    def open(cls, artifact: Artifact, settings: EngineSettings | None = None) -> Engine:
        """Verify the files, start the worker, load, self-check. Raises ArtifactError, EngineLoadError or …MemoryError, EngineDiedError."""
        settings = settings or EngineSettings()
        _check_settings(settings)
        verify_files(artifact)
        context = min(settings.context_tokens, artifact.manifest.llm.context_length)
        return cls(artifact, replace(settings, context_tokens=context))

    @classmethod
    def open_text(cls, artifact: Artifact, settings: EngineSettings | None = None) -> Engine:
        """The language model alone, of any GGUF (textmodel.py). Raises EngineLoadError or …MemoryError, EngineDiedError."""
        settings = settings or EngineSettings()
        _check_settings(settings)
        context = min(settings.context_tokens, artifact.manifest.llm.context_length)
        return cls(artifact, replace(settings, context_tokens=context), text_only=True)

    def _start(self) -> tuple[WorkerProcess, LoadReport]:
        process = WorkerProcess(LOAD_SILENCE_S, _dense_environment(self.settings.device) if self.settings.dense_prompts else None)
        try:
            report = process.call(Load(self.artifact, self.settings, self._text_only))
        except EngineDiedError as error:
            process.close()
            # llama.cpp does not survive every allocation that fails, and a system kills what takes too much.
            if lacks_memory([error.message]) or "SIGKILL" in error.message:
                raise EngineMemoryError(f"The model does not fit this machine's memory. {error.message}", MEMORY_HINT) from error
            raise
        except BaseException:
            process.close()
            raise
        if not isinstance(report, LoadReport):
            raise EngineError(f"Expected a report on loading, found {type(report).__name__}.")
        process.silence_limit_s = self.settings.silence_limit_s
        return process, report

    def _live(self) -> WorkerProcess:
        """The worker, started anew if it has died."""
        with self._lock:
            if self._closed:
                raise EngineError("The engine is closed.", "Open it again.")
            if not self._process.alive:
                self._process.close()
                if not self._text_only:
                    verify_files(self.artifact)  # the folder may hold another model by now
                self._process, self._report = self._start()
                self._restarts += 1
            return self._process

    # -- answers ------------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Start a request; iterate for its events. Raises InputError for images or text that do not fit, or EngineError."""
        self._check_request(request)
        for _ in range(2):
            process = self._live()
            try:
                return Stream(process, process.begin(Submit(request)))
            except EngineDiedError as error:
                died = error  # it died unnoticed, before this request reached it: start it anew
        raise died

    def ask_group(self, requests: Sequence[Request]) -> list[Collected | EdgemedError]:
        """Answer requests together, with nothing else beside them: the same group always gets the same answers. See groups.py.

        A request that does not fit is an error in its place; raises InputError as `submit` does, EngineDiedError where the worker ends.
        Texts are as the model wrote them (`core.conversation.clean_answer` makes them readable).
        """
        for request in requests:
            self._check_request(request)
        reply = self._live().call(SubmitGroup(tuple(requests)))
        if not isinstance(reply, list):
            raise EngineError(f"Expected a list from the engine, found {type(reply).__name__}.")
        return reply

    def _check_request(self, request: Request) -> None:
        self._check_images(request.images)
        wanted = sum(turn.images for turn in request.turns)
        if wanted != len(request.images):
            found = len(request.images)
            raise InputError(f"Expected {wanted} image(s), as the turns count, found {found}.", "Hand over the images of all turns.")
        self._check_text([*(turn.text for turn in request.turns), *request.stop])
        _check_sampling(request.sampling)
        if request.max_tokens < 1 or not request.turns or request.turns[-1].role != "user":
            raise InputError("Expected turns that end with the user's, and max_tokens of at least 1.", "Check the request.")

    def _check_text(self, texts: Sequence[str]) -> None:
        _check_unicode(texts)
        size, most = sum(map(len, texts)), max(LEAST_TEXT_LIMIT, TEXT_LIMIT_PER_TOKEN * self.settings.context_tokens)
        if size > most:  # before it is cut into tokens, which takes the time of everybody's answers
            raise ContextOverflowError(f"Expected at most {most:,} characters of text, found {size:,}.", "Shorten it.")

    def ask(self, turns: str | Sequence[Turn], images: Sequence[Path | PreparedImage] = (), **options: Any) -> Finished:
        """Collect an answer, its text cleaned of stop strings and labels. A plain question is one turn with all the images."""
        if isinstance(turns, str):
            turns = (Turn("user", turns, images=len(images)),)
        stream = self.submit(prepare_request(self.artifact, turns, images, **options))
        for event in stream:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                text = clean_answer(self.artifact.manifest.template, event.text)
                return Finished(text, event.reason, event.usage, event.timings)
        raise EngineError("The engine ended an answer without a closing event.", "Report this as a fault of edgemed.")

    # -- insight ------------------------------------------------------------------------------------------------------

    def embed(self, image: PreparedImage) -> F32:
        """The rows that the LLM sees for an image, float32 [image_tokens, width]."""
        self._check_images((image,))
        return self._array(Embed(image))

    def evaluate(
        self,
        segments: Sequence[Text | ImageSlot | int],
        images: Sequence[PreparedImage] = (),
        all_positions: bool = True,
        last: int = 1,
        reuse: bool = False,
    ) -> F32:
        """Logits after segments (core.conversation) or bare token ids, run alone: float32 [positions, vocab], all or the `last` ones.

        reuse: start from what the cache holds of the evaluation before, which is faster for many questions about one image.
        """
        self._check_images(images)
        self._check_text([segment.text for segment in segments if isinstance(segment, Text)])
        if last < 1:
            raise InputError(f"Expected the logits of at least one position, found {last}.", "Check the evaluation.")
        return self._array(Evaluate(tuple(segments), tuple(images), all_positions, last, reuse))

    def tokenize(self, segments: Sequence[Text | ImageSlot | int]) -> list[int]:
        """The token ids that segments become; an image is one prompt.IMAGE_TOKEN."""
        _check_unicode([segment.text for segment in segments if isinstance(segment, Text)])
        ids = self._live().call(Tokenize(tuple(segments)))
        return [int(i) for i in ids] if isinstance(ids, list) else []

    def _array(self, command: Embed | Evaluate) -> F32:
        reply = self._live().call(command)
        if not isinstance(reply, np.ndarray):
            raise EngineError(f"Expected an array from the engine, found {type(reply).__name__}.")
        return reply

    @property
    def report(self) -> LoadReport:
        """What loading found."""
        return self._report

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def stats(self) -> EngineStats:
        """A snapshot; restarts a dead worker."""
        process = self._live()
        reply = process.call(Stats())
        if not isinstance(reply, SchedulerStats):
            raise EngineError(f"Expected statistics from the engine, found {type(reply).__name__}.")
        report = self._report
        return EngineStats(
            pid=process.pid,
            slots=self.settings.slots,
            busy=reply.busy,
            queued=reply.queued,
            kv_used_tokens=min(reply.kv_used_tokens, report.kv_tokens),
            kv_size_tokens=report.kv_tokens,
            tokens_per_s=reply.tokens_per_s,
            total_tokens=reply.total_tokens,
            images_encoded=reply.images_encoded,
            embeddings_reused=reply.embeddings_reused,
            model_bytes=report.model_bytes,
            vision_bytes=report.vision_bytes,
            kv_bytes=report.kv_bytes,
            restarts=self._restarts,
            memory=measure_memory(process.pid, self.settings.device),
            account=reply.account,
        )

    def _check_images(self, images: Sequence[PreparedImage]) -> None:
        if images and self._text_only:
            raise InputError("Expected text alone, found an image: the model was loaded without a vision tower.", "Leave the image out.")
        size = self.artifact.manifest.image.size_px
        for image in images:
            if image.size_px != size or len(image.pixels) != size * size * 3:
                raise InputError(f"Expected images of {size} × {size} px, found {image.size_px} px.", "Prepare them for this model.")

    # -- end ----------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """End the worker; requests in flight fail."""
        with self._lock:
            self._closed = True
            self._process.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _check_sampling(sampling: Sampling) -> None:
    whole = (sampling.seed, sampling.top_k)
    numbers = (sampling.temperature, sampling.top_p, sampling.min_p, sampling.repeat_penalty)
    if not all(isinstance(n, int) for n in whole) or not all(math.isfinite(n) for n in numbers) or sampling.repeat_penalty <= 0:
        said = "Expected whole numbers for seed and top_k, finite ones for the rest and a penalty above 0, found others."
        raise InputError(said, "Check the sampling.")


def _check_unicode(texts: Sequence[str]) -> None:
    # A lone surrogate is what Python makes of bytes that are not UTF-8, and of half an escape in JSON.
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError as error:
        raise InputError("Expected text in Unicode, found bytes that are none.", "Type the question again.") from error


def _dense_environment(device: int) -> dict[str, str]:
    library = dense.built_library(read_capability(device))
    if library is None:
        raise EngineLoadError(
            "Expected the library for dense prompts and a GPU for it, found that it was not built for one.", "Run: python -m runtimes.dense"
        )
    return dense.environment(library)


def _check_settings(settings: EngineSettings) -> None:
    if not settings.silence_limit_s >= LEAST_SILENCE_S:
        found = f"Expected a silence_limit_s of {LEAST_SILENCE_S:g} or more, found {settings.silence_limit_s}."
        raise InputError(found, "Check the engine's settings.")
    if (settings.kv_tokens is not None and settings.kv_tokens < 1) or (settings.threads is not None and settings.threads < 1):
        raise InputError("Expected positive numbers for kv_tokens and threads.", "Check the engine's settings.")
    if not 1 <= settings.slots <= min(256, settings.batch_tokens):
        raise InputError(f"Expected 1 to {min(256, settings.batch_tokens)} slots, found {settings.slots}.", "Use fewer slots.")
    if settings.context_tokens < 1 or settings.batch_tokens < 1 or settings.micro_batch < 1 or settings.shared_prefill_tokens < 1:
        raise InputError("Expected positive numbers of tokens for context and batches.", "Check the engine's settings.")
