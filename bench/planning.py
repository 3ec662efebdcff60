"""What the planner predicts beside what a model really takes, over a grid of settings.

    python -m bench.planning [--device cpu|cuda] [--quick] ARTIFACT...

Every setting is loaded, its context filled (an image and text in every slot, answered together) and its memory sampled meanwhile.
Two figures are compared with the prediction: the **account** (buffers that llama.cpp and libmtmd report) and what is **taken**: on a
CPU the PSS of the process tree after loading and at its peak, on a GPU what NVML says that the card holds more than before. The last
lines say the worst under- and overestimate of each; the very last is JSON. Nothing is emulated here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from edgemed.core.conversation import Text, Turn
from edgemed.core.errors import EdgemedError
from edgemed.core.manifest import Artifact, load_artifact
from edgemed.core.probe import probe_pixels
from edgemed.core.units import format_bytes
from runtimes import libllama
from runtimes.dense import BATCH_TOKENS, MICRO_BATCH
from runtimes.engine import Engine, prepare_request
from runtimes.estimate import Estimate, Host, estimate_memory
from runtimes.graph import CPU, GPU, Place
from runtimes.memory import measure_memory
from runtimes.messages import Buffer, EngineSettings, Failed, PreparedImage
from runtimes.opening import load_target
from runtimes.shape import PairShape, read_shape

NEW_TOKENS = 8
SAMPLE_S = 0.05
# Where nothing of ours lies, a card still shows some kB of others'.
LEAST_BYTES = 1_000_000
UNDER_LIMIT, OVER_LIMIT = 0.98, 1.08
# What the process adds to the account, which has no such buffers.
_BESIDE = frozenset({"program", "scratch", "images", "dense prompts"})


@dataclass(frozen=True)
class Comparison:
    """One figure: predicted over measured is what counts."""

    what: str
    predicted_bytes: int
    measured_bytes: int

    @property
    def ratio(self) -> float:
        return self.predicted_bytes / self.measured_bytes if self.measured_bytes else math.inf


def cpu_grid(quick: bool) -> Iterator[EngineSettings]:
    """Contexts, slots, cache types and micro-batches, each with all the others at their usual values, and some together."""
    base = {"gpu_layers": 0, "context_tokens": 1024}
    varied: list[dict[str, object]] = [
        {},
        {"context_tokens": 512},
        {"context_tokens": 2048},
        {"slots": 2},
        {"slots": 4, "context_tokens": 512},
        {"kv_type": "q8_0"},
        {"kv_type": "q8_0", "slots": 2},
        {"micro_batch": 128},
        {"micro_batch": 256, "context_tokens": 2048},
        {"flash_attention": "off"},
    ]
    for change in varied[:: 4 if quick else 1]:
        yield EngineSettings(**{**base, **change})  # type: ignore[arg-type]


def cuda_grid(layers: int, quick: bool, dense: bool) -> Iterator[EngineSettings]:
    """No, some and all layers on the GPU, the tower on either, two contexts, cache types, micro-batches, slots, and dense prompts."""
    for micro_batch, slots in ((MICRO_BATCH, 1), (512, 1), (MICRO_BATCH, 4)) if dense else ():
        yield EngineSettings(context_tokens=2048, slots=slots, batch_tokens=BATCH_TOKENS, micro_batch=micro_batch, dense_prompts=True)
    for gpu_layers, tower in itertools.product((0, layers // 2, -1), ("gpu", "cpu")):
        yield EngineSettings(context_tokens=2048, gpu_layers=gpu_layers, tower=tower)  # type: ignore[arg-type]
    if quick:
        return
    varied: list[dict[str, object]] = [
        {"context_tokens": 1024},
        {"slots": 4},
        {"kv_type": "q8_0"},
        {"micro_batch": 128},
        {"micro_batch": 256, "slots": 2, "kv_type": "q8_0"},
        {"flash_attention": "off"},
        {"vision_flash_attention": "on"},
        {"gpu_layers": layers // 2, "kv_type": "q8_0"},
        {"gpu_layers": layers // 4, "slots": 2},
    ]
    for change in varied:
        yield EngineSettings(**{"context_tokens": 2048, **change})  # type: ignore[arg-type]


class Sampler:
    """The peak of a process tree's PSS and of the card's use, by a thread."""

    def __init__(self, device: int) -> None:
        self.device, self.pss, self.used = device, 0, 0

    def sample(self) -> None:
        report = measure_memory(os.getpid(), self.device)
        self.pss = max(self.pss, report.pss_bytes or 0)
        self.used = max(self.used, report.device_used_bytes or 0)

    @contextmanager
    def running(self) -> Iterator[None]:
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(SAMPLE_S):
                self.sample()

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self.sample()


def fill(engine: Engine) -> None:
    """One answer in every slot at once, with an image and as much text as the context holds. Raises what an engine raises."""
    record, settings = engine.artifact.manifest, engine.settings
    size_px = record.image.size_px
    room = settings.context_tokens - record.vision.image_tokens - NEW_TOKENS - 64
    words = "the heart is seen "
    repeats = max(0, room * 8 // max(1, len(engine.tokenize([Text(words * 8)]))))
    failed: list[EdgemedError] = []

    def ask(slot: int) -> None:
        pixels = np.roll(probe_pixels(size_px), 11 * slot, axis=0).tobytes()
        turn = Turn("user", f"{slot}: {words * repeats}", images=1)
        request = prepare_request(engine.artifact, (turn,), (PreparedImage(pixels, size_px),), max_tokens=NEW_TOKENS, ignore_end=True)
        failed.extend(event.error for event in engine.submit(request) if isinstance(event, Failed))

    threads = [threading.Thread(target=ask, args=(slot,)) for slot in range(settings.slots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def compare(artifact: Artifact, shape: PairShape, settings: EngineSettings, host: Host) -> list[Comparison]:
    """Load, fill and compare."""
    estimate = estimate_memory(shape, settings, host, libllama.tensor_bytes)
    before = measure_memory(os.getpid(), settings.device).device_used_bytes
    sampler, loaded = Sampler(settings.device), Sampler(settings.device)
    with Engine.open(artifact, settings) as engine:
        for _ in range(3):
            time.sleep(0.1)
            loaded.sample()
        with sampler.running():
            fill(engine)
        account = engine.stats().account
    places: tuple[Place, ...] = (GPU, CPU) if host.gpu else (CPU,)
    rows = [Comparison(f"account {place}", _predicted_account(estimate, place), _account_bytes(account, place)) for place in places]
    if host.gpu and before is not None:
        rows.append(Comparison("taken GPU dynamic", estimate.dynamic_bytes(GPU), sampler.used - before))
    if not host.gpu:
        rows.append(Comparison("taken CPU static", estimate.static_bytes(CPU), loaded.pss))
        rows.append(Comparison("taken CPU dynamic", estimate.dynamic_bytes(CPU), sampler.pss))
    return [row for row in rows if max(row.predicted_bytes, row.measured_bytes) >= LEAST_BYTES]


def _predicted_account(estimate: Estimate, place: Place) -> int:
    return sum(item.size_bytes for item in estimate.items if item.place == place and item.what not in _BESIDE)


def _account_bytes(account: tuple[Buffer, ...], place: Place) -> int:
    """Host memory that CUDA pins ("CUDA_Host") lies in main memory."""
    return sum(b.size_bytes for b in account if (b.place.startswith("CUDA") and b.place != "CUDA_Host") == (place == GPU))


def host_of(device: str) -> Host:
    """This machine as the estimate wants it. Raises ResourceError where a GPU is asked for and llama.cpp finds none."""
    return load_target(device).host


def warm_up(artifact: Artifact, host: Host) -> None:
    """The first load by a runtime runs the tower for its self-check, which holds more after loading than any later one."""
    for tower in ("gpu", "cpu") if host.gpu else ("cpu",):
        Engine.open(artifact, EngineSettings(context_tokens=512, gpu_layers=0, tower=tower)).close()


def describe(settings: EngineSettings) -> str:
    """What is not as usual, in a line."""
    usual = EngineSettings()
    named = (
        "context_tokens", "slots", "kv_type", "micro_batch", "flash_attention", "vision_flash_attention", "gpu_layers", "tower",
        "dense_prompts",
    )  # fmt: skip
    shown = [f"{name} {getattr(settings, name)}" for name in named if getattr(settings, name) != getattr(usual, name)]
    return ", ".join(shown) or "as usual"


def worst(rows: list[Comparison]) -> dict[str, dict[str, float]]:
    """Lowest and highest ratio of each kind of figure."""
    kinds = dict.fromkeys(row.what for row in rows)
    found = {kind: [row.ratio for row in rows if row.what == kind] for kind in kinds}
    return {kind: {"settings": len(ratios), "under": min(ratios), "over": max(ratios)} for kind, ratios in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", type=Path, nargs="+")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="a few settings of each model")
    args = parser.parse_args()
    host = host_of(args.device)
    rows: list[Comparison] = []
    records: list[dict[str, object]] = []
    for folder in args.artifacts:
        artifact = load_artifact(folder)
        shape = read_shape(artifact, libllama.tensor_bytes)
        warm_up(artifact, host)
        dense = host.dense == "built" and shape.suits_dense_prompts
        for settings in cuda_grid(shape.llm.layers, args.quick, dense) if host.gpu else cpu_grid(args.quick):
            if settings.context_tokens < shape.image_tokens + 128:
                continue
            print(f"{artifact.folder.name}: {describe(settings)}")
            try:
                found = compare(artifact, shape, settings, host)
            except EdgemedError as error:  # one setting that fails must not lose the others' figures; it is in the result
                print(f"    failed: {error.message}", flush=True)
                records.append({"artifact": artifact.folder.name, "settings": asdict(settings), "failed": error.message})
                continue
            rows += found
            for row in found:
                sizes = f"predicted {format_bytes(row.predicted_bytes):>9}  measured {format_bytes(row.measured_bytes):>9}"
                print(f"    {row.what:<18} {sizes}  ratio {row.ratio:.3f}", flush=True)
            records.append({"artifact": artifact.folder.name, "settings": asdict(settings), "figures": [asdict(row) for row in found]})
    summary = worst(rows)
    for kind, figures in summary.items():
        held = figures["under"] >= UNDER_LIMIT and figures["over"] <= OVER_LIMIT
        verdict = "within the goal" if held else "outside the goal"
        print(f"{kind:<18} {figures['settings']:.0f} settings: {figures['under']:.3f} to {figures['over']:.3f} of the measured, {verdict}")
    print(json.dumps({"device": args.device, "worst": summary, "settings": records}))


if __name__ == "__main__":
    main()
