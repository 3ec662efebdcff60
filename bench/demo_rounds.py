"""Trains edgemed-demo in two rounds on a host with GPUs: variants of the recipe side by side, then the best of them.

    python -m bench.demo_rounds --base BASE --tower DIR --data DIR --out DIR --first 400 --second 700

The first two stages run once, without the images that are kept back to choose by (bench/train_demo.py --develop). Each of VARIANTS then
trains the last stage in a process of its own for `--first` seconds; a training of this size leaves most of a large GPU idle, so several
share one (as many on each, or they would not be equals). The one with the highest score on what was kept back (`score_of`, a rule set
beforehand) trains again for `--second` seconds with those images too, on all GPUs. OUT, which must be new, gets choice.json with the
scores, final/ with the parts, and a log a process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    """The best of the variants that came to their end, by rounded weights; writes choice.json."""
    probes = {name: json.loads((out / name / "run.json").read_text())["probe"]["rounded"] for name in names}
    scores = {name: round(score_of(probe), 2) for name, probe in probes.items()}
    best = max(scores, key=lambda name: scores[name])
    (out / "choice.json").write_text(json.dumps({"best": best, "scores": scores, "probes": probes}, indent=1))
    print("scores", scores, "best", best, flush=True)
    return best


def visible_gpus(count: int) -> list[str]:
    """So many of the GPUs that this process may use, by the names that CUDA_VISIBLE_DEVICES has for them."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(count)]
    if len(names) < count:
        sys.exit(f"Expected {count} GPUs, found CUDA_VISIBLE_DEVICES={given}.")
    return names[:count]


class Processes:
    """Processes whose words go to OUT/NAME.log, OUT being new; none outlives this one, however it ends."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], gpus: Sequence[str]) -> None:
        """On these GPUs; none of them: on the CPU."""
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
        with (self.out / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def wait(self) -> list[str]:
        """The names of those that ended well, once all have ended."""
        codes = {name: process.wait() for name, process in self.running.items()}
        self.running = {}
        print("ended with", codes, flush=True)
        return [name for name, code in codes.items() if code == 0]

    def __enter__(self) -> Processes:
        if self.out.exists():
            sys.exit(f"Expected a new folder, found {self.out}.")
        self.out.mkdir(parents=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("Ended from outside."))
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.running.values():
            process.terminate()


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
    names = args.only or list(VARIANTS)
    if args.gpus < 1 or len(names) % args.gpus:
        parser.error(f"expected as many variants on each GPU, found {len(names)} on {args.gpus}")
    with Processes(args.out) as processes:
        run_rounds(args, more, names, processes)


def run_rounds(args: argparse.Namespace, more: Sequence[str], names: Sequence[str], processes: Processes) -> None:
    """The first two stages, the variants, and the best one again. Exits with 1 where one of these fails."""
    common = ["--base", args.base, "--tower", args.tower, "--data", args.data, "--out", args.out, *more]
    train = [sys.executable, "-m", "bench.train_demo", *map(str, common), "--cpu" if args.cpu else "--compile"]
    gpus = [] if args.cpu else visible_gpus(args.gpus)
    times = ["--align-seconds", str(args.align_seconds), "--instruct-seconds", str(args.instruct_seconds)]
    processes.start("start", [*train, "--develop", *times], gpus[:1])
    if not processes.wait():
        sys.exit(f"The first two stages ended early: see {args.out / 'start.log'}.")
    train += ["--instructed", str(args.out)]
    for number, name in enumerate(names):
        processes.start(name, [*train, "--develop", *variant(name, args.first)], [gpus[number % len(gpus)]] if gpus else [])
    ended = processes.wait()
    if not ended:
        sys.exit(f"No variant came to its end: see the logs in {args.out}.")
    best = choose(args.out, ended)
    if len(gpus) > 1:
        train[1:3] = ["-m", "torch.distributed.run", f"--nproc_per_node={len(gpus)}", "-m", "bench.train_demo"]
    processes.start("final", [*train, "--batch-size", str(args.second_batch), *variant(best, args.second, "final")], gpus)
    if not processes.wait():
        sys.exit(f"The last training failed: see {args.out / 'final.log'}.")


def variant(name: str, seconds: int, as_name: str | None = None) -> list[str]:
    """The options of bench/train_demo.py for a variant."""
    keys, options = VARIANTS[name]
    return [*options, "--variant", f"{as_name or name}:{seconds}" + (f",{keys}" if keys else "")]


if __name__ == "__main__":
    main()
