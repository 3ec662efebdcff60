"""Trains edgemed-demo in two rounds on a host with GPUs: variants of the recipe side by side, then the best of them.

    python -m bench.demo_rounds --base BASE --tower DIR --data DIR --out DIR --first 400 --second 700

The first two stages run once, without the images that are kept back to choose by (bench/train_demo.py --develop). Each of VARIANTS then
trains the last stage in a process of its own for `--first` seconds; a training of this size leaves most of a large GPU idle, so several
share one. The one with the highest score on what was kept back (`score_of`, a rule set beforehand) trains again for `--second` seconds
with those images too, on all GPUs. OUT/choice.json tells the scores, OUT/final has the parts, OUT/*.log what each process said.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.train_demo import DEVELOP

# A name, keys of the last stage's recipe, and options of bench/train_demo.py.
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain": ("", ()),
    "facts": ("", ("--facts",)),
    "moved": (
        "lora.dropout=0.1,optim.rotate_deg=10.0,optim.scale=0.12,optim.shift=0.06,optim.brightness=0.08,optim.contrast=0.25,"
        "optim.tower_rate=2e-4",
        ("--facts",),
    ),
    "slake": ("data.0.repeat=6", ("--facts",)),
}
SLAKE, VQA_RAD, PATHVQA = DEVELOP


def score_of(probe: Mapping[str, Mapping[str, float]]) -> float:
    """The mean of SLAKE closed and open, VQA-RAD closed and PathVQA closed: open answers of the other two are too many to hit exactly."""
    return statistics.mean((probe[SLAKE]["closed"], probe[SLAKE]["open"], probe[VQA_RAD]["closed"], probe[PATHVQA]["closed"]))


def choose(out: Path, names: Sequence[str]) -> str:
    """The best variant of those that came to their end, by rounded weights; writes choice.json."""
    runs = {name: json.loads(path.read_text()) for name in names if (path := out / name / "run.json").is_file()}
    probes = {name: run["probe"]["rounded"] for name, run in runs.items() if "probe" in run}
    if not probes:
        sys.exit(f"Expected a variant that was scored in {out}, found none: see its logs.")
    scores = {name: round(score_of(probe), 2) for name, probe in probes.items()}
    best = max(scores, key=lambda name: scores[name])
    (out / "choice.json").write_text(json.dumps({"best": best, "scores": scores, "probes": probes}, indent=1))
    print("scores", scores, "best", best, flush=True)
    return best


def start(out: Path, name: str, command: Sequence[str], gpus: Sequence[int] | None) -> subprocess.Popen[bytes]:
    """A process whose words go to OUT/NAME.log, on these GPUs; None: no GPU."""
    visible = "" if gpus is None else ",".join(map(str, gpus))
    with (out / f"{name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "CUDA_VISIBLE_DEVICES": visible})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--tower", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--align-seconds", type=int, default=20)
    parser.add_argument("--instruct-seconds", type=int, default=60)
    parser.add_argument("--first", type=int, required=True, help="seconds of each variant")
    parser.add_argument("--second", type=int, required=True, help="seconds of the best one")
    parser.add_argument("--second-batch", type=int, default=64)
    parser.add_argument("--only", action="append", choices=VARIANTS, help="these variants; all where left out")
    parser.add_argument("--cpu", action="store_true", help="no GPU: a dry run")
    args, more = parser.parse_known_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = args.only or list(VARIANTS)
    common = ["--base", args.base, "--tower", args.tower, "--data", args.data, *more, "--cpu" if args.cpu else "--compile"]
    train = [sys.executable, "-m", "bench.train_demo", *map(str, common)]
    gpus = None if args.cpu else list(range(args.gpus))

    times = ["--align-seconds", str(args.align_seconds), "--instruct-seconds", str(args.instruct_seconds)]
    first = [*train, "--out", str(args.out), "--develop"]
    if start(args.out, "start", [*first, *times], gpus and gpus[:1]).wait():
        sys.exit(f"The first two stages ended early: see {args.out / 'start.log'}.")
    print("first two stages done", flush=True)
    first += ["--instructed", str(args.out)]
    running = [start(args.out, n, [*first, *variant(n, args.first)], gpus and [gpus[i % len(gpus)]]) for i, n in enumerate(names)]
    print("variants ended with", dict(zip(names, [process.wait() for process in running], strict=True)), flush=True)
    best = choose(args.out, names)

    second: list[Any] = [*train, "--out", str(args.out), "--instructed", str(args.out)]
    if not args.cpu and args.gpus > 1:
        second[1:3] = ["-m", "torch.distributed.run", f"--nproc_per_node={args.gpus}", "-m", "bench.train_demo"]
    second += ["--batch-size", str(args.second_batch), *variant(best, args.second, "final")]
    print("final ended with", start(args.out, "final", second, gpus).wait(), flush=True)


def variant(name: str, seconds: int, as_name: str | None = None) -> list[str]:
    """The options of bench/train_demo.py for a variant."""
    keys, options = VARIANTS[name]
    return [*options, "--variant", f"{as_name or name}:{seconds}" + (f",{keys}" if keys else "")]


if __name__ == "__main__":
    main()
