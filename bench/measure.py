"""What a converted model costs: the static card first, then what was measured phase by phase, then the distance between the two.

    trace = measure_artifact(artifact, find_device("cpu"), questions=30)          # a profile of runtimes/devices.py

Questions of a fixed length (64 new tokens, greedy) about pictures that it has not seen, three to a picture, after a warm-up. A device
that is not here has its budget emulated, and every figure says so. Memory is told three times:

seed-compat   the paper's definitions, from the runtime's account: static, the weights on the device; dynamic, all buffers there
account       the runtime's own buffers, by what and where (runtimes/account.py)
seen          what the device lost: a GPU's growth or the process's own number by NVML, on a board with shared memory the whole
              system's growth, on a CPU the PSS of the process tree, pages of mapped files (weights) told apart
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from bench.card import Card, make_card
from bench.sampler import Sample, Samples, sampled
from edgemed.core.manifest import Artifact
from edgemed.core.probe import probe_pixels
from runtimes import libllama
from runtimes.devices import Profile
from runtimes.emulation import emulate
from runtimes.engine import Engine
from runtimes.messages import Buffer, EngineSettings, Finished, PreparedImage
from runtimes.native import unused
from runtimes.opening import plan_artifact
from runtimes.planner import Wish

QUESTIONS = ("Describe this image in detail.", "What organs can be seen? Name all of them.", "Is anything abnormal? Explain.")
MAX_TOKENS = 64
CONTEXT_TOKENS = 2048
Basis = Literal["process", "growth", "system", "pss", "rss"]


@dataclass(frozen=True)
class Phase:
    """A named span: how often, seconds each (median, and the 5th and 95th percentile), and the highest reading within it."""

    name: str
    count: int
    median_s: float
    low_s: float
    high_s: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Trace:
    """One measurement. Bytes, seconds, tokens per second, watts. `settings` are those the plan chose."""

    card: Card
    settings: EngineSettings
    phases: tuple[Phase, ...]
    questions: int
    new_tokens: int
    account: tuple[Buffer, ...]
    seed_static_bytes: int
    seed_dynamic_bytes: int
    # What the device lost at most, and how that is known; None where nothing tells.
    seen_bytes: int | None
    basis: Basis
    # Of a CPU's PSS at its highest: pages of mapped files.
    mapped_bytes: int | None
    first_token_s: float
    # None: no second question was asked.
    follow_up_first_token_s: float | None
    decode_tokens_per_s: float
    power_w: float | None
    devices: tuple[str, ...]
    runtime: str
    # Readings, for a picture: (seconds since the start, bytes).
    timeline: tuple[tuple[float, int], ...]
    # Where each phase of the first questions began, likewise.
    marks: tuple[tuple[str, float, float], ...]
    # What is emulated on what, where the figures are not the device's own.
    emulated: str = ""
    # What the processor could do and the installed llama.cpp was not built for, where it was the processor that ran.
    unused: tuple[str, ...] = ()


def measure_artifact(artifact: Artifact, device: Profile, questions: int = 30, progress: Callable[[int, int], None] | None = None) -> Trace:
    """Plan, load, ask, and measure. Raises what the engine raises, and ResourceError."""
    wish = Wish(context_tokens=min(CONTEXT_TOKENS, artifact.manifest.llm.context_length))
    with emulate(device) as stage:
        plan = plan_artifact(artifact, stage.target, wish)
        depth = artifact.manifest.vision.image_tokens + MAX_TOKENS
        card, unified = make_card(artifact, plan, depth), device.unified and not stage.label
        trace = _measure(artifact, card, stage.limit(plan), unified, questions, progress)
        return replace(trace, emulated=stage.label)


def _measure(
    artifact: Artifact,
    card: Card,
    settings: EngineSettings,
    unified: bool,
    questions: int,
    progress: Callable[[int, int], None] | None,
) -> Trace:
    spans: list[tuple[str, float, float]] = []
    answers: list[Finished] = []
    with sampled(os.getpid(), settings.device) as samples:
        start = time.monotonic()
        with Engine.open(artifact, settings) as engine:
            spans.append(("load", start, time.monotonic()))
            engine.ask(QUESTIONS[0], [_picture(artifact, 0)], max_tokens=4, ignore_end=True)  # warm-up
            for number in range(questions):
                image, turn = divmod(number, len(QUESTIONS))
                begin = time.monotonic()
                answer = engine.ask(QUESTIONS[turn], [_picture(artifact, image + 1)], max_tokens=MAX_TOKENS, ignore_end=True)
                answers.append(answer)
                spans += _spans(answer, begin, first=turn == 0)
                if progress:
                    progress(number + 1, questions)
            report, account = engine.report, engine.stats().account
    gpu = on_gpu(report.devices)
    basis = _basis(samples.all, gpu, unified)
    read = _reader(samples.all, basis)
    firsts, later = [a for i, a in enumerate(answers) if i % 3 == 0], [a for i, a in enumerate(answers) if i % 3]
    peak = max(samples.all, key=lambda s: read(s) or 0)
    here = [b for b in account if on_device(b.place, gpu)]
    decode_s = sum(a.timings.decode_s for a in answers)
    watts = [s.power_w for s in samples.between(spans[1][1], spans[-1][2]) if s.power_w is not None] if len(spans) > 1 else []
    return Trace(
        card=card,
        settings=settings,
        phases=tuple(_phases(spans, samples, read)),
        questions=len(answers),
        new_tokens=sum(a.usage.new_tokens for a in answers),
        account=account,
        seed_static_bytes=sum(b.size_bytes for b in here if b.what in ("weights", "tower weights")),
        seed_dynamic_bytes=sum(b.size_bytes for b in here),
        seen_bytes=read(peak),
        basis=basis,
        mapped_bytes=peak.mapped if basis == "pss" else None,
        first_token_s=statistics.median(a.timings.first_token_s for a in firsts),
        follow_up_first_token_s=statistics.median(a.timings.first_token_s for a in later) if later else None,
        decode_tokens_per_s=sum(a.usage.new_tokens - 1 for a in answers) / decode_s if decode_s > 0 else 0.0,
        power_w=statistics.median(watts) if watts else None,
        devices=report.devices,
        runtime=report.runtime,
        timeline=tuple((s.at_s - start, value) for s in samples.all if (value := read(s)) is not None),
        marks=tuple((name, a - start, b - start) for name, a, b in spans),
        unused=() if gpu else unused(libllama.cpu_features()),
    )


def _picture(artifact: Artifact, number: int) -> PreparedImage:
    """The probe's image, rolled, so that each number has other pixels."""
    size_px = artifact.manifest.image.size_px
    return PreparedImage(np.roll(probe_pixels(size_px), 3 * number, axis=0).tobytes(), size_px)


def _spans(answer: Finished, begin: float, first: bool) -> list[tuple[str, float, float]]:
    """When the phases of an answer were, by its timings."""
    t = answer.timings
    encoded, token = begin + t.queue_s + t.encode_s, begin + t.first_token_s
    if not first:
        return [("second question", begin, token), ("decode", token, token + t.decode_s)]
    return [("image encode", begin, encoded), ("prefill", encoded, token), ("decode", token, token + t.decode_s)]


def _phases(spans: Sequence[tuple[str, float, float]], samples: Samples, read: Callable[[Sample], int | None]) -> list[Phase]:
    phases = []
    for name in dict.fromkeys(name for name, _, _ in spans):
        mine = [(a, b) for n, a, b in spans if n == name]
        took = [b - a for a, b in mine]
        seen = [value for a, b in mine for s in samples.between(a, b) if (value := read(s)) is not None]
        low, high = np.percentile(took, [5, 95])
        phases.append(Phase(name, len(mine), statistics.median(took), float(low), float(high), max(seen, default=None)))
    return phases


def on_gpu(devices: tuple[str, ...]) -> bool:
    """Whether an engine's devices (LoadReport.devices) are more than the CPU."""
    return any(name != "CPU" for name in devices)


def on_device(place: str, gpu: bool) -> bool:
    """Whether a buffer of the runtime's account is on the GPU, or where there is none in main memory, as what CUDA pins there is."""
    return (place.startswith("CPU") or place.endswith("_Host")) != gpu


def _basis(samples: Sequence[Sample], gpu: bool, unified: bool) -> Basis:
    if gpu and unified:
        return "system"
    if gpu:
        return "process" if any(s.gpu_process is not None for s in samples) else "growth"
    return "pss" if any(s.pss is not None for s in samples) else "rss"  # a process that ends meanwhile has none


def _reader(samples: Sequence[Sample], basis: Basis) -> Callable[[Sample], int | None]:
    """How a reading is told: growth is over the first, which was taken before anything was loaded but an emulated budget's ballast."""

    def growth(values: Callable[[Sample], int | None]) -> Callable[[Sample], int | None]:
        before = values(samples[0])

        def read(sample: Sample) -> int | None:
            now = values(sample)
            return None if now is None or before is None else max(0, now - before)

        return read

    plain: dict[str, Callable[[Sample], int | None]] = {
        "process": growth(lambda s: s.gpu_process or 0),
        "growth": growth(lambda s: s.gpu_used),
        "system": growth(lambda s: s.system_used),
        "pss": lambda s: s.pss,
        "rss": lambda s: s.rss,
    }
    return plain[basis]
