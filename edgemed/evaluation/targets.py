"""What is asked: our engine with an artifact, or any server that speaks OpenAI's protocol. (transformers: reference.py.)

    with EngineTarget(artifact) as target:
        replies = target.answer(samples_about_one_image, "shown")

A target answers the questions about one image together. Greedy. Knows no metric and no file but the images.
"""

from __future__ import annotations

import base64
import hashlib
import io
import queue
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from edgemed.core.calibration import score_of
from edgemed.core.conversation import clean_answer
from edgemed.core.errors import EdgemedError, EngineDiedError, EngineError, MissingExtraError, ResourceError
from edgemed.core.identity import identify_model
from edgemed.core.images import ImagePreparation, prepare
from edgemed.data.samples import Sample
from edgemed.evaluation.looks import View, show
from runtimes.consult import pack_pixels
from runtimes.engine import Engine
from runtimes.memory import measure_memory
from runtimes.messages import Collected, EngineSettings, PreparedImage, Request
from runtimes.system import physical_cores

if TYPE_CHECKING:
    from edgemed.core.manifest import Artifact

# To be increased whenever the way questions share batches changes: last bits move with it, so an older run is not gone on with.
ANSWERING = 3
# Answers of these sets are a few words.
MAX_TOKENS = 24
# Questions about one image that are answered at once. Their batches are so wide that weights are read once for all of them.
SLOTS = 16
# Cells for a question and its answer beside the image.
_TEXT_CELLS = 96
_CONTEXT_TEXT = 1024
_BLANK_PX = 336
# Engines at most, and what share of the free memory (1 / …) all their weights may take.
MOST_WORKERS = 8
_MEMORY_SHARE = 4


@dataclass(frozen=True)
class Reply:
    """An answer. `score`: see core.calibration; `error` says why there is none; the time is the group's, shared out evenly."""

    text: str
    tokens: int = 0
    score: float | None = None
    elapsed_s: float = 0.0
    memory_bytes: int | None = None
    error: str = ""


class Target(Protocol):
    """What the runner asks."""

    @property
    def name(self) -> str:
        """The model_id of predictions."""

    @property
    def identity(self) -> str:
        """A hash of all that an answer depends on but the question."""

    @property
    def parallel(self) -> int:
        """How many images' questions may be asked at once, from as many threads."""

    def answer(self, samples: Sequence[Sample], view: View, donor: Path | None = None) -> list[Reply]:
        """Answers to questions about one image, in order. Raises ImageError and what the target's own errors are."""


def evaluation_settings(artifact: Artifact, slots: int = SLOTS, threads: int | None = None) -> EngineSettings:
    """Room for so many questions about one image at once; `threads` None: physical cores."""
    m = artifact.manifest
    context = min(m.vision.image_tokens + _CONTEXT_TEXT, m.llm.context_length)
    return EngineSettings(
        context_tokens=context,
        slots=slots,
        threads=threads,
        kv_tokens=max(context, slots * (m.vision.image_tokens + _TEXT_CELLS)),
        shared_prefill_tokens=EngineSettings.batch_tokens,
    )


def choose_workers(artifact: Artifact) -> int:
    """Engines of one thread each that a CPU should run: one a core, where their weights are small beside the memory that is free.

    Threads of one engine wait for one another some hundred times a token; engines never wait.
    """
    weights = sum(record.size_bytes for record in artifact.manifest.files.values())
    room = psutil.virtual_memory().available // (_MEMORY_SHARE * max(1, weights))
    return max(1, min(physical_cores(), MOST_WORKERS, int(room)))


class EngineTarget:
    """An artifact in engines of ours: `workers` of them on a CPU, each for the questions about another image; None: `choose_workers`."""

    def __init__(
        self,
        artifact: Artifact,
        slots: int = SLOTS,
        max_tokens: int = MAX_TOKENS,
        threads: int | None = None,
        workers: int | None = 1,
    ) -> None:
        self.artifact, self.max_tokens = artifact, max_tokens
        self._model = identify_model(artifact)
        self._slots = slots
        self.parallel = workers or (choose_workers(artifact) if threads is None else 1)
        if self.parallel > 1 and threads is None:
            threads = max(1, physical_cores() // self.parallel)
        settings = evaluation_settings(artifact, slots, threads)
        self._engines: list[Engine] = []
        try:
            while len(self._engines) < self.parallel:
                self._engines.append(Engine.open(artifact, settings))
                if self._engines[0].report.devices != ("CPU",):
                    self.parallel = 1  # one engine fills a GPU
        except BaseException:
            self.close()
            raise
        self._free: queue.SimpleQueue[Engine] = queue.SimpleQueue()
        for engine in self._engines:
            self._free.put(engine)

    @property
    def name(self) -> str:
        return f"{self._model.name}-{self._model.quant}"

    @property
    def identity(self) -> str:
        # How many are answered at once is part of it: batches of another width round otherwise.
        report = self._engines[0].report
        facts = (ANSWERING, self._model.sha256, self._slots, self.max_tokens, report.runtime, *report.devices)
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    @property
    def model_sha256(self) -> str:
        """Of the artifact's manifest."""
        return self._model.sha256

    @property
    def pids(self) -> list[int]:
        """The engines' processes."""
        return [engine.pid for engine in self._engines]

    def answer(self, samples: Sequence[Sample], view: View, donor: Path | None = None) -> list[Reply]:
        start = time.monotonic()
        image = self._prepare(samples[0].image, view, donor)
        shown = () if image is None else (image,)
        requests = [Request(s.turns[:-1], shown, max_tokens=self.max_tokens, logprobs=True) for s in samples]
        engine = self._free.get()
        try:
            collected = _ask_twice(engine, requests)
            memory = measure_memory(engine.pid)
        finally:
            self._free.put(engine)
        share_s = (time.monotonic() - start) / len(samples)
        return [self._reply(c, share_s, memory.pss_bytes or memory.rss_bytes) for c in collected]

    def _reply(self, collected: Collected | EdgemedError, elapsed_s: float, memory_bytes: int) -> Reply:
        if isinstance(collected, EngineError):
            raise collected
        if isinstance(collected, EdgemedError):  # the question's own fault, as one that is too long: counted and named
            return Reply("", elapsed_s=elapsed_s, memory_bytes=memory_bytes, error=collected.message)
        text = clean_answer(self.artifact.manifest.template, collected.finished.text)
        return Reply(text, collected.finished.usage.new_tokens, score_of(collected.logprobs), elapsed_s, memory_bytes)

    def _prepare(self, path: Path | None, view: View, donor: Path | None) -> PreparedImage | None:
        if path is None:
            return None
        preparation = self.artifact.manifest.image
        picture = show(path, view, donor)
        return blank_image(preparation) if picture is None else pack_pixels(prepare(picture, preparation))

    def __enter__(self) -> EngineTarget:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the engines."""
        for engine in self._engines:
            engine.close()


def _ask_twice(engine: Engine, requests: Sequence[Request]) -> list[Collected | EdgemedError]:
    try:
        return engine.ask_group(requests)
    except EngineDiedError:
        return engine.ask_group(requests)  # in a new process; a second death is the question's fault


def blank_image(preparation: ImagePreparation) -> PreparedImage:
    """An image of nothing but the padding colour: what a model answers without seeing."""
    return PreparedImage(bytes(preparation.pad_colour) * preparation.size_px**2, preparation.size_px)


class EndpointTarget:
    """A server that speaks OpenAI's chat protocol, asked through the `openai` client, which tries again by itself."""

    parallel = 1

    def __init__(self, url: str, model: str, key: str = "none", max_tokens: int = MAX_TOKENS) -> None:
        try:
            import openai
        except ImportError as error:
            raise MissingExtraError.of("Asking a server", "judge") from error
        self._openai: Any = openai
        self._client: Any = openai.OpenAI(base_url=url, api_key=key, max_retries=5, timeout=300)
        self._url, self._model, self._max_tokens = url, model, max_tokens

    @property
    def name(self) -> str:
        return self._model

    @property
    def identity(self) -> str:
        return hashlib.sha256(repr((self._url, self._model, self._max_tokens)).encode()).hexdigest()

    def answer(self, samples: Sequence[Sample], view: View, donor: Path | None = None) -> list[Reply]:
        link = _data_link(samples[0].image, view, donor) if samples[0].image else None
        return [self._ask(sample, link) for sample in samples]

    def _ask(self, sample: Sample, link: str | None) -> Reply:
        start = time.monotonic()
        messages: list[dict[str, Any]] = [{"role": turn.role, "content": turn.text} for turn in sample.turns[:-1]]
        if link:
            messages[0]["content"] = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": messages[0]["content"]}]
        try:
            reply = self._client.chat.completions.create(
                model=self._model, messages=messages, temperature=0, max_tokens=self._max_tokens, seed=0
            )
        except self._openai.BadRequestError as error:
            return Reply("", elapsed_s=time.monotonic() - start, error=f"The server refused the question: {error}")
        except self._openai.OpenAIError as error:
            raise ResourceError(f"The server at {self._url} did not answer: {error}", "Check its address and try again.") from error
        text = (reply.choices[0].message.content or "") if reply.choices else ""
        tokens = reply.usage.completion_tokens if reply.usage else 0
        return Reply(text.strip(), tokens, elapsed_s=time.monotonic() - start)


def _data_link(path: Path, view: View, donor: Path | None) -> str:
    from PIL import Image

    picture = show(path, view, donor) or Image.new("RGB", (_BLANK_PX, _BLANK_PX))
    data = io.BytesIO()
    picture.save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
