"""Everything that is measured on a GPU, one step after another, for a machine that is lent for half an hour.

    python -m bench.gpu_round WORK --bin-dir DIR [--steps make,tiny,med,budget,planning] [--preload LIB] [--threads 8]

WORK gets the full-width checkpoints (18 GB), their conversions, and a JSON file a step. `make` generates and converts; `tiny` and `med`
put our rows beside llama.cpp's and transformers' (bench.peers); `budget` runs med as on an RTX 3050; `planning` compares predictions with
the card. `--preload` names a library that answers "no" to ggml_cuda_should_use_mmq, which is what a build with
GGML_CUDA_FORCE_CUBLAS does; rows with it follow those without. A step that fails is told and the next one runs. Measures nothing itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

STEPS = ("make", "tiny", "med", "budget", "planning")
SMALL = '{"kv_type":"q8_0","micro_batch":256}'
LARGE = '{"batch_tokens":2048,"micro_batch":1024}'


@dataclass(frozen=True)
class Round:
    """What the steps need."""

    work: Path
    bin_dir: Path
    threads: int
    preload: Path | None

    def artifact(self, model: str) -> Path:
        return self.work / f"{model}4"


Command = tuple[list[str], dict[str, str]]


def python(module: str, *arguments: object) -> list[str]:
    """A module of ours as a command."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def make(r: Round) -> Iterator[Command]:
    """Checkpoints and conversions; med's is measured, which is as `edgemed convert` does it."""
    for model in ("tiny", "med"):
        yield python("bench.full_width", model, r.work / model), {}
        scratch = r.work / f"{model}-work"
        yield python("bench.conversion", r.work / model, "--ours-only", 4, "--threads", os.cpu_count(), "--work", scratch), {}
        yield ["mv", str(scratch / "whole-4"), str(r.artifact(model))], {}


def peers(model: str) -> Callable[[Round], Iterator[Command]]:
    """Rows of ours with several settings, the last of them with transformers and llama-server beside it."""

    def rows(r: Round) -> Iterator[Command]:
        base = [r.work / model, "--artifact", r.artifact(model), "--device", "gpu", "--bin-dir", r.bin_dir, "--threads", r.threads]
        ours = [*base, "--modes", "none", "--skip-server", "--settings"]
        yield python("bench.peers", *ours, SMALL, "--settings", LARGE, "--json", r.work / f"{model}-settings.json"), {}
        if r.preload:
            preload = {"LD_PRELOAD": str(r.preload.resolve())}
            yield python("bench.peers", *ours, LARGE, "--json", r.work / f"{model}-cublas.json"), preload
        yield python("bench.peers", *base, "--settings", "{}", "--modes", "fp16,4-bit", "--json", r.work / f"{model}.json"), {}

    return rows


def budget(r: Round) -> Iterator[Command]:
    """The 7 B model in what a 6 GB card has to give."""
    yield python("edgemed", "bench", r.artifact("med"), "--device", "rtx3050", "--save", r.work / "med-rtx3050.json", "--quiet"), {}


def planning(r: Round) -> Iterator[Command]:
    """Predicted beside measured."""
    yield python("bench.planning", "--device", "cuda", r.artifact("tiny")), {}
    yield python("bench.planning", "--device", "cuda", "--quick", r.artifact("med")), {}


TABLE: dict[str, Callable[[Round], Iterator[Command]]] = {
    "make": make,
    "tiny": peers("tiny"),
    "med": peers("med"),
    "budget": budget,
    "planning": planning,
}


def run(steps: Sequence[str], round_: Round) -> int:
    """Commands that failed."""
    failed = 0
    begun = time.monotonic()
    for step in steps:
        for command, extra in TABLE[step](round_):
            print(f"[{time.monotonic() - begun:6.1f}] {step}: {' '.join(command[1:])} {extra or ''}", flush=True)
            code = subprocess.run(command, env=os.environ | extra).returncode
            if code:
                failed += 1
                print(f"[{time.monotonic() - begun:6.1f}] {step}: exit code {code}", flush=True)
    print(f"[{time.monotonic() - begun:6.1f}] {failed} command(s) failed")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_round", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--bin-dir", type=Path, required=True, help="llama-bench, llama-mtmd-cli and llama-server of the same build")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--preload", type=Path, metavar="LIB")
    parser.add_argument("--threads", type=int, default=8)
    args = parser.parse_args()
    steps = args.steps.split(",")
    if unknown := sorted(set(steps) - set(STEPS)):
        parser.error(f"expected steps out of {', '.join(STEPS)}, found {', '.join(unknown)}")
    args.work.mkdir(parents=True, exist_ok=True)
    return int(run(steps, Round(args.work, args.bin_dir, args.threads, args.preload)) > 0)


if __name__ == "__main__":
    sys.exit(main())
