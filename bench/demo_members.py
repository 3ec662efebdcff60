"""Trains edgemed-demo on from one checkpoint several times at once, and makes the mean of what comes out (bench/demo_average.py).

    python -m bench.train_demo --base BASE --tower DIR --assemble edgemed/demo --out BEGUN
    python -m bench.demo_members --base BASE --tower DIR --data DIR --out DIR --continued BEGUN --gpus 2 --members 4 --seconds 1000

All members have the same recipe but for the seed and, in turns, how far images and light are moved (MOVES): the less their errors are
alike, the more a mean takes away. A training of this size leaves most of a large GPU idle, so that two share one (600 rows a second
together on two H200s, 390 by one on both; docs/LOG.md). Nothing is chosen by a score: the mean of those that came to their end is what
there is. OUT, which must be new, gets a folder and a log a member, and mean/, all as parts (bench/demo_parts.py). More options are
bench/train_demo.py's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.demo_average import average_parts
from bench.demo_rounds import Processes, visible_gpus

MOVES = (
    "lora.dropout=0.1,optim.rotate_deg=12.0,optim.scale=0.15,optim.shift=0.08,optim.brightness=0.1,optim.contrast=0.3",
    "lora.dropout=0.15,optim.rotate_deg=18.0,optim.scale=0.2,optim.shift=0.12,optim.brightness=0.15,optim.contrast=0.4",
)
# Lower rates than those of the training before, since it goes on from a model that has learnt; SLAKE and VQA-RAD four times an epoch,
# what is made of SLAKE's rows twice.
KEYS = (
    "optim.llm_rate=5e-4,optim.projector_rate=2e-4,optim.tower_rate=1.5e-4,optim.weight_decay=0.05,optim.warmup_ratio=0.06,"
    "data.0.repeat=4,data.1.repeat=4,data.0.mirror=true,data.1.mirror=true,data.2.mirror=true,data.4.repeat=2,data.5.repeat=2"
)
FIRST_SEED = 11
# The last stage's name in a member's folder.
STAGE = "trained"


def member(number: int, seconds: float) -> list[str]:
    """bench/train_demo.py's options of a member."""
    keys = f"{MOVES[number % len(MOVES)]},{KEYS}"
    return ["--facts", "--translated", "--unscored", "--seed", str(FIRST_SEED + number), "--variant", f"{STAGE}:{seconds:g},{keys}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--tower", "--data", "--out", "--continued"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--members", type=int, default=4)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--cpu", action="store_true", help="no GPU: a dry run")
    args, more = parser.parse_known_args()
    if args.members < 2 or not args.cpu and (args.gpus < 1 or args.members % args.gpus):
        parser.error(f"expected two members or more, as many on each GPU, found {args.members} on {args.gpus}")
    with Processes(args.out) as processes:
        train_members(args, more, processes)


def train_members(args: argparse.Namespace, more: Sequence[str], processes: Processes) -> None:
    """All members at once, then the mean of those that came to their end. Exits with 1 where fewer than two did."""
    common = ["--base", args.base, "--tower", args.tower, "--data", args.data, "--continued", args.continued, *more]
    train = [sys.executable, "-m", "bench.train_demo", *map(str, common), "--cpu" if args.cpu else "--compile"]
    gpus = [] if args.cpu else visible_gpus(args.gpus)
    for number in range(args.members):
        own = ["--out", str(args.out / f"member-{number}"), *member(number, args.seconds)]
        processes.start(f"member-{number}", [*train, *own], [gpus[number % len(gpus)]] if gpus else [])
    ended = processes.wait()
    if len(ended) < 2:
        sys.exit(f"Fewer than two members came to their end: see the logs in {args.out}.")
    kept = average_parts([args.out / name / STAGE for name in ended], args.out / "mean")
    print(f"{args.out / 'mean'}: the mean of {len(ended)}; kept of the adapters' mean: {kept:.5f}", flush=True)


if __name__ == "__main__":
    main()
