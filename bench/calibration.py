"""Calibrated against plain 4-bit conversion of edgemed-demo at equal bytes: divergence from F16 in the engine.

    python -m bench.calibration --dataset slake=PATH [--questions 500] [--samples 512] [--work DIR]

Calibrates on the training split, measures on the first English questions of another (validate), with their images. F16, plain and
calibrated files answer the same questions, the reference answer read along; KL of a question is the mean over its answer's positions,
up to the token that ends it, of Σ p_F16 · (log p_F16 − log p). Artifacts that are in --work already are measured as they are. Needs
the `train` extra, to calibrate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from converters.calibration.gather import SAMPLES, draw_samples, gather
from converters.checkpoint import Checkpoint
from converters.convert import convert
from converters.readers import open_checkpoint
from converters.recipes import Recipe
from edgemed.core.conversation import ConversationTemplate, ImageSlot, Text, Turn, render
from edgemed.core.manifest import MANIFEST_NAME, Artifact, load_artifact
from edgemed.core.registry import DEFAULT_MODEL, load_registry, locate_sources
from edgemed.data import Sample, load_samples
from edgemed.report.tables import print_table
from runtimes.engine import Engine, prepare_image
from runtimes.messages import EngineSettings

F64 = NDArray[np.float64]
GOAL = 0.7
CONTEXT_TOKENS = 1024
KINDS = ("F16", "plain", "calibrated")


def open_demo() -> Checkpoint:
    """edgemed-demo's source, as `edgemed convert` opens it."""
    entry = load_registry().find(DEFAULT_MODEL)
    parts = locate_sources(entry)
    found = open_checkpoint(parts.model, adapter=parts.adapter, mmproj=parts.mmproj, template=entry.template, name=entry.name)
    return replace(found, rounded=entry.rounded)


def build_artifacts(work: Path, dataset: str, path: Path, samples: int) -> dict[str, Artifact]:
    """The three conversions, made where `work` lacks them."""
    checkpoint = open_demo()
    out = {}
    for kind in KINDS:
        folder = work / kind
        if not (folder / MANIFEST_NAME).is_file():
            recipe = Recipe.of(bits=16 if kind == "F16" else 4)
            drawn = draw_samples(load_samples(dataset, path, "train"), samples) if kind == "calibrated" else []
            calibration = gather(checkpoint, drawn, dataset, "train") if drawn else None
            convert(checkpoint, folder, recipe, calibration=calibration)
        out[kind] = load_artifact(folder)
    return out


def file_bytes(artifact: Artifact) -> int:
    """Both files."""
    return sum(record.size_bytes for record in artifact.manifest.files.values())


def segments_of(template: ConversationTemplate, sample: Sample) -> tuple[list[Text | ImageSlot], list[Text | ImageSlot]]:
    """(the prompt, the prompt with the answer up to the token that ends it)."""
    prompt = render(template, sample.turns[:-1])
    whole = render(template, (*sample.turns[:-1], Turn("assistant", sample.answer)))
    end = whole[-1]
    if isinstance(end, Text) and template.stop and template.stop[0] in end.text:
        whole[-1] = Text(end.text.split(template.stop[0])[0] + template.stop[0], True)
    return prompt, whole


def log_softmax(logits: NDArray[np.float32]) -> F64:
    """Over the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    out: F64 = x - np.log(np.exp(x).sum(-1, keepdims=True))
    return out


def answer_logits(engine: Engine, sample: Sample) -> F64:
    """Log-probabilities at each position that predicts a token of the answer, [tokens, vocab]."""
    prompt, whole = segments_of(engine.artifact.manifest.template, sample)
    tokens = len(engine.tokenize(whole)) - len(engine.tokenize(prompt))
    images = [prepare_image(engine.artifact, sample.image)] if sample.image else []
    return log_softmax(engine.evaluate(whole, images, all_positions=False, last=tokens + 1, reuse=True)[:-1])


@dataclass
class Divergence:
    """Sums over questions, against F16."""

    kl: list[float] = field(default_factory=list)
    agreed: int = 0
    positions: int = 0

    def add(self, right: F64, found: F64) -> None:
        self.kl.append(float((np.exp(right) * (right - found)).sum(-1).mean()))
        self.agreed += int((right.argmax(-1) == found.argmax(-1)).sum())
        self.positions += len(right)

    @property
    def mean(self) -> float:
        return float(np.mean(self.kl))


def measure(artifacts: dict[str, Artifact], samples: Sequence[Sample], note_every: int = 20) -> dict[str, Divergence]:
    """Run every question through all three engines."""
    found = {kind: Divergence() for kind in KINDS[1:]}
    with ExitStack() as stack:
        # One thread each, side by side: two of each would wait for one another.
        settings = EngineSettings(context_tokens=CONTEXT_TOKENS, threads=1)
        engines = [stack.enter_context(Engine.open(artifacts[kind], settings)) for kind in KINDS]
        pool = stack.enter_context(ThreadPoolExecutor(len(engines)))
        for number, sample in enumerate(samples, start=1):
            right, *others = pool.map(answer_logits, engines, [sample] * len(engines))
            for kind, other in zip(KINDS[1:], others, strict=True):
                found[kind].add(right, other)
            if number % note_every == 0:
                print(number, "questions,", ", ".join(f"{k} {d.mean:.5f}" for k, d in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="NAME=PATH")
    parser.add_argument("--split", default="validate")
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--work", type=Path, help="folder of the three artifacts; a temporary one where left out")
    args = parser.parse_args()
    if args.split == "train":
        parser.error("Calibration sees the training split; measure on another.")
    name, _, path = args.dataset.partition("=")
    samples = load_samples(name, Path(path), args.split)[: args.questions]
    with tempfile.TemporaryDirectory() as scratch:
        artifacts = build_artifacts(args.work or Path(scratch), name, Path(path), args.samples)
        found = measure(artifacts, samples)
        sizes = {kind: file_bytes(artifact) for kind, artifact in artifacts.items()}
    rows = [
        (kind, f"{sizes[kind]}", f"{d.mean:.5f}", f"{np.median(d.kl):.5f}", f"{100 * d.agreed / d.positions:.2f} %")
        for kind, d in found.items()
    ]
    print_table(f"{len(samples)} questions of {name}, {args.split}, against F16", ("files", "bytes", "KL", "median KL", "top-1"), rows)
    ratio = found["calibrated"].mean / found["plain"].mean
    report = {
        "questions": len(samples),
        "positions": found["plain"].positions,
        "bytes": sizes,
        "kl": {kind: d.mean for kind, d in found.items()},
        "top1": {kind: d.agreed / d.positions for kind, d in found.items()},
        "ratio": ratio,
        "goal": GOAL,
        "met": ratio <= GOAL and sizes["calibrated"] <= sizes["plain"],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
