"""Where a token's time goes: llama.cpp alone and through our scheduler, in turns, in one process with one loaded model.

    python -m bench.token_time ARTIFACT [--device gpu] [--depth 794] [--rounds 8] [--settings JSON] [--json FILE]
    python -m bench.token_time ARTIFACT --played 600

llama.cpp alone is llama-bench's loop: llama_decode, llama_synchronize, the next token by chance. Ours is a request as the engine's own
process runs it. Both fill in a prompt of `depth` tokens first and then write 128; told are microseconds a token over all of them, as
llama-bench counts, the median of those after the first four, and how much longer the first four took: after a prompt llama.cpp builds
another graph, and on a GPU captures it at the second token; llama-bench itself does so in one of its runs only, and then goes on from
a stored cache.

`--played US` computes nothing: a GPU of so many microseconds is played, and what ours takes beside it is all ours (with logits that
lie in the processor's cache, as they may not behind a real GPU's copy).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# First, as it brings llama_cpp, which comes before numpy (runtimes/worker.py).
from runtimes import libllama, worker

# isort: split
import numpy as np

from edgemed.core.conversation import Turn
from edgemed.core.manifest import Artifact, load_artifact
from edgemed.report.tables import print_table
from runtimes.engine import prepare_request
from runtimes.messages import EngineSettings, Finished
from runtimes.scheduler import Scheduler
from runtimes.wire import Load, Submit

NEW_TOKENS = 128
# After them llama.cpp's graph is captured and stays.
FIRST = 4


class Box(worker.Outbox):
    """The process's outbox, writing to nowhere; remembers the last closing event."""

    def __init__(self) -> None:
        super().__init__(open(os.devnull, "wb"))  # noqa: SIM115  # for the process's life
        self.ended: Finished | None = None

    def send(self, id: int, reply: object) -> None:
        if isinstance(reply, Finished):
            self.ended = reply
        super().send(id, reply)


@dataclass(frozen=True)
class Times:
    """Microseconds a token over all, the median of the later ones, and what the first four took beyond four of these."""

    all_us: float
    later_us: float
    first_us: float


def times(stamps: list[float]) -> Times:
    """Of the moments at which tokens were begun (and the last one ended)."""
    each = [1e6 * (b - a) for a, b in itertools.pairwise(stamps)]
    later = statistics.median(each[FIRST:])
    return Times(statistics.mean(each), later, sum(each[:FIRST]) - FIRST * later)


def alone(llm: libllama.LanguageModel, depth: int, wait: Callable[[], object]) -> Times:
    """llama-bench's loop after a prompt by chance."""
    chance = random.Random(0)
    for start in range(0, depth, llm.batch_tokens):
        n = min(llm.batch_tokens, depth - start)
        code = llm.decode_tokens([chance.randrange(5, llm.vocab_size) for _ in range(n)], range(start, start + n), [[0]] * n, [])
        if code != 0:
            raise SystemExit(f"llama_decode returned {code}.")
    wait()
    stamps = []
    for k in range(NEW_TOKENS):
        stamps.append(time.perf_counter())
        llm.decode_token(chance.randrange(5, llm.vocab_size), depth + k, 0)
        wait()
    return times([*stamps, time.perf_counter()])


def ours(scheduler: Scheduler, box: Box, artifact: Artifact, question: str) -> Times:
    """One answer of the scheduler; its tokens are begun where `decode_token` is called."""
    llm, stamps, box.ended = scheduler._llm, [], None
    decode = llm.decode_token

    def stamped(token: int, position: int, sequence: int) -> int:
        stamps.append(time.perf_counter())
        return decode(token, position, sequence)

    llm.decode_token = stamped  # type: ignore[method-assign]
    request = prepare_request(artifact, (Turn("user", question),), [], max_tokens=NEW_TOKENS + 1, ignore_end=True)
    scheduler.post(1, Submit(request))
    while box.ended is None:
        scheduler.step()
    llm.decode_token = decode
    return times([*stamps, stamps[0] + box.ended.timings.decode_s])


def play(llm: libllama.LanguageModel, gpu_us: float) -> Callable[[], object]:
    """Have the model compute nothing, for so long; returns what waits for it."""
    idle = bytes(6000)
    logits, begun = np.random.default_rng(0).normal(size=llm.vocab_size).astype(np.float32), [0.0]

    def launch(*_: Any) -> int:
        begun[0] = time.perf_counter()
        return 0

    def wait(*_: Any) -> Any:
        while time.perf_counter() < begun[0] + gpu_us / 1e6:
            zlib.crc32(idle)  # other threads may run, as beside a real one
        return logits

    llm.decode_token, llm.decode_tokens, llm.logits = launch, launch, wait  # type: ignore[method-assign, assignment]
    return wait


def clear(scheduler: Scheduler) -> None:
    """Forget all that was asked."""
    for slot in scheduler._slots:
        scheduler._placement.clear(slot)
    scheduler._llm.forget(0, 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--depth", type=int, default=794)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--settings", default="{}", help="EngineSettings as JSON")
    parser.add_argument("--played", type=float, metavar="US", help="play a GPU that takes so long for a token")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    artifact = load_artifact(args.folder)
    base: dict[str, Any] = {"context_tokens": 2048} | ({} if args.device == "gpu" else {"gpu_layers": 0, "threads": 2})
    libllama.quiet_logs()
    box = Box()
    scheduler, report = worker.load(Load(artifact, EngineSettings(**(base | json.loads(args.settings))), text_only=True), box)
    llm = scheduler._llm
    wait: Callable[[], object] = partial(libllama.lib.llama_synchronize, llm._ctx)
    if args.played:
        wait, scheduler._ahead = play(llm, args.played), True
    question = "Describe"
    while len(llm.tokenize(question)) < args.depth - 20:  # a template's own tokens are about 20
        question += " it" * 10
    rows: list[tuple[Times, Times]] = []
    for number in range(-1, args.rounds):  # the first is a warm-up
        clear(scheduler)
        bare = alone(llm, args.depth, wait)
        clear(scheduler)
        mine = ours(scheduler, box, artifact, question)
        if number >= 0:
            rows.append((bare, mine))
    table = [
        [str(k), *(f"{value:.1f}" for t in pair for value in asdict(t).values()), f"{pair[0].all_us / pair[1].all_us:.3f}"]
        for k, pair in enumerate(rows)
    ]
    middle = [
        statistics.median(values)
        for values in zip(*([*asdict(a).values(), *asdict(b).values(), a.all_us / b.all_us] for a, b in rows), strict=True)
    ]
    table.append(["median", *(f"{value:.1f}" for value in middle[:-1]), f"{middle[-1]:.3f}"])
    head = ["round", "alone, us", "later", "first 4, beyond", "ours, us", "later", "first 4, beyond", "alone / ours"]
    print_table(f"{artifact.folder.name} on {', '.join(report.devices)}: a token's time", head, table)
    if args.json:
        args.json.write_text(json.dumps([{"alone": asdict(a), "ours": asdict(b)} for a, b in rows], indent=1))


if __name__ == "__main__":
    main()
