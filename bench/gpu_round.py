"""Everything that is measured on a GPU, one step after another, for a machine that is lent for a few minutes.

    python -m bench.gpu_round WORK --bin-dir DIR [--steps make,tiny,med,parity,planning,settings,budget] [--models tiny,med]
        [--switch GGML_CUDA_PDL=1] [--threads 8]

WORK gets the full-width checkpoints (18 GB), their conversions, a log a command and a JSON file a comparison. Only what is in STEPS is
done; a step that fails is told with its last lines, and the next one runs. The tables come last. Nothing needs a network.

Rows with dense prompts (runtimes/dense.py) stand beside those without where their library can be built. Measures nothing itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.peers import Row, cells, columns
from edgemed.core.errors import EdgemedError
from edgemed.report.tables import print_table
from runtimes.dense import build, built_library
from runtimes.memory import read_capability

SMALL = '{"kv_type":"q8_0","micro_batch":256}'
LARGE = '{"batch_tokens":2048,"micro_batch":1024}'
DENSE = '{"dense_prompts":true,"batch_tokens":2048,"micro_batch":1024}'
# The tower's attention as before it was chosen by the size of its heads.
PLAIN = '{"vision_flash_attention":"off"}'
QUIET = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1", "GGML_NO_BACKTRACE": "1"}
LAST_LINES = 6


@dataclass(frozen=True)
class Round:
    """What the steps need."""

    work: Path
    bin_dir: Path
    threads: int
    dense: bool
    models: tuple[str, ...] = ("tiny", "med")
    # Of the environment, each tried alone.
    switches: tuple[str, ...] = ()

    def artifact(self, model: str) -> Path:
        return self.work / f"{model}4"


Command = tuple[list[str], dict[str, str]]


def python(module: str, *arguments: object) -> list[str]:
    """A module of ours as a command."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def make(r: Round) -> Iterator[Command]:
    """Checkpoints and conversions, each measured and made as `edgemed convert` does it; those that are there are kept."""
    for model in r.models:
        if r.artifact(model).is_dir():
            continue
        yield python("bench.full_width", model, r.work / model), {}
        scratch = r.work / f"{model}-work"
        yield python("bench.conversion", r.work / model, "--ours-only", 4, "--threads", os.cpu_count(), "--work", scratch), {}
        yield ["mv", str(scratch / "whole-4"), str(r.artifact(model))], {}


def peers(model: str) -> Callable[[Round], Iterator[Command]]:
    """First token: ours by default and with dense prompts, beside llama-server and transformers."""

    def rows(r: Round) -> Iterator[Command]:
        if model not in r.models:
            return
        base = [r.work / model, "--artifact", r.artifact(model), "--device", "gpu", "--bin-dir", r.bin_dir, "--threads", r.threads]
        others = [*([PLAIN] if model == "med" else []), *([DENSE] if r.dense else [])]
        ours = ["--settings", "{}", *(word for chosen in others for word in ("--settings", chosen)), "--programs"]
        yield python("bench.peers", *base, *ours, "bench,server", "--modes", "fp16", "--json", r.work / f"{model}.json"), {}
        for switch in r.switches:
            more = ["--settings", "{}", "--programs", "none", "--modes", "none", "--json", r.work / f"{model}-{switch}.json"]
            name, _, value = switch.partition("=")
            yield python("bench.peers", *base, *more), {name: value}

    return rows


def settings(r: Round) -> Iterator[Command]:
    """Memory and speed with other settings, llama-mtmd-cli and transformers' 4 bits beside them."""
    for model in r.models:
        base = [r.work / model, "--artifact", r.artifact(model), "--device", "gpu", "--bin-dir", r.bin_dir, "--threads", r.threads]
        more = ["--settings", SMALL, "--settings", LARGE, "--programs", "bench,mtmd", "--modes", "4-bit"]
        yield python("bench.peers", *base, *more, "--json", r.work / f"{model}-settings.json"), {}


def parity(r: Round) -> Iterator[Command]:
    """CLIP's tower with the attention that is chosen for it, against transformers."""
    yield python("bench.parity_full", "clip336", "--device", "cuda", "--work", r.work), {}


def budget(r: Round) -> Iterator[Command]:
    """The 7 B model in what a 6 GB card has to give."""
    yield python("edgemed", "bench", r.artifact("med"), "--device", "rtx3050", "--save", r.work / "med-rtx3050.json", "--quiet"), {}


def planning(r: Round) -> Iterator[Command]:
    """Predicted beside measured."""
    if "tiny" in r.models:
        yield python("bench.planning", "--device", "cuda", r.artifact("tiny")), {}
    if "med" in r.models:
        yield python("bench.planning", "--device", "cuda", "--quick", r.artifact("med")), {}


# In the order of what is most wanted. Seconds on an H100 with 16 cores, guessed from the single figures of docs/LOG.md: make 120, med 110,
# tiny 50, parity 30, planning 240, settings 150, budget 60.
STEPS: dict[str, Callable[[Round], Iterator[Command]]] = {
    "make": make,
    "med": peers("med"),
    "tiny": peers("tiny"),
    "parity": parity,
    "planning": planning,
    "settings": settings,
    "budget": budget,
}


def run(steps: Sequence[str], round_: Round) -> int:
    """Commands that failed."""
    failed = 0
    begun = time.monotonic()
    for step in steps:
        for number, (command, extra) in enumerate(STEPS[step](round_), 1):
            log = round_.work / f"{step}-{number}.log"
            started = time.monotonic()
            with log.open("wb") as f:
                code = subprocess.run(command, env=os.environ | QUIET | extra, stdout=f, stderr=subprocess.STDOUT).returncode
            told = " ".join(word.rsplit("/", 1)[-1] for word in command[1:])
            print(f"[{started - begun:5.0f} + {time.monotonic() - started:4.0f} s] {step}: {told} {' '.join(extra)}", flush=True)
            if code:
                failed += 1
                print(f"exit code {code}:", *last_lines(log), sep="\n  ", flush=True)
    return failed


def last_lines(log: Path) -> list[str]:
    """The end of what a command printed."""
    return [line[:200] for line in log.read_text(errors="replace").splitlines() if line.strip()][-LAST_LINES:]


def report(round_: Round) -> None:
    """A table of all comparisons in WORK, and the last words of the other steps."""
    rows = [[path.stem, *cells(Row(**row))] for path in sorted(round_.work.glob("*.json")) for row in read_rows(path)]
    for log in sorted(path for name in ("make", "parity", "planning") for path in round_.work.glob(f"{name}-*.log")):
        print(f"{log.stem}:", *last_lines(log), sep="\n  ")
    if rows:
        print_table("Beside its peers", ["comparison", *columns(True)], rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """What bench.peers saved; nothing of another file."""
    data = json.loads(path.read_text())
    return data if isinstance(data, list) and all("program" in row for row in data) else []


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_round", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--bin-dir", type=Path, required=True, help="llama-bench, llama-mtmd-cli and llama-server of the same build")
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--models", default="tiny,med")
    parser.add_argument("--switch", action="append", default=[], metavar="NAME=VALUE", help="a row of ours with this in the environment")
    parser.add_argument("--threads", type=int, default=8)
    args = parser.parse_args()
    steps = args.steps.split(",")
    if unknown := sorted(set(steps) - set(STEPS)):
        parser.error(f"expected steps out of {', '.join(STEPS)}, found {', '.join(unknown)}")
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        library = built_library(read_capability()) or build(shutil.which("nvcc"), read_capability())
    except EdgemedError as error:  # time on the machine is dear: the rest is measured all the same
        print(f"No rows with dense prompts: {error.message}", flush=True)
        library = None
    round_ = Round(args.work, args.bin_dir, args.threads, library is not None, tuple(args.models.split(",")), tuple(args.switch))
    failed = run(steps, round_)
    report(round_)
    print(f"{failed} command(s) failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
