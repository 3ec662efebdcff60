"""Questions a minute on a set of images: `edgemed eval` against llama.cpp's own programs, in one run on one machine.

    python -m bench.eval_speed ARTIFACT --dataset slake=PATH --bin-dir DIR [--images N] [--slots-images 16] [--json FILE]

DIR holds llama-server and llama-mtmd-cli of the same llama.cpp. All are asked the same way, greedy, at most 24 tokens, with the same
cores. The programs take turns, some images each, so that whatever else the machine does falls on all alike; not too few, since engines of
ours wait for one another at the end of each turn, as they do once in an evaluation:

- ours: all questions about an image as one group, an engine of one thread for each core (as `edgemed eval` does by itself)
- llama-server: one question after another over HTTP with its own prompt cache on, questions about one image in a row; and once more with
  as many slots and clients as ours has, which is more than the comparison asks for and slow, so on the first images only
- llama-mtmd-cli: a process a question, on the first few questions only

Each is compared with ours on the rounds in which it answered too. Loading is not counted for those that stay loaded. Seconds of processors
are told beside those on the wall: on a machine that others use, they say more. The share of equal answers is told, so that nobody is
fast by answering less.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image

from bench.peers import free_port, wait_ready
from edgemed.core.images import load_image, prepare
from edgemed.core.manifest import Artifact, load_artifact
from edgemed.data import Sample, load_named, parse_dataset
from edgemed.evaluation.metrics import words
from edgemed.evaluation.runner import group_samples, run
from edgemed.evaluation.targets import MAX_TOKENS, SLOTS, EngineTarget
from edgemed.report.tables import print_table
from runtimes.system import physical_cores

HTTP_TIMEOUT_S = 600
# Images to a turn.
ROUND = 16


@dataclass
class Clock:
    """One program's answers, and what each round took: seconds on the wall and of processors, and questions that were answered."""

    program: str
    rounds: dict[int, tuple[float, float, int]] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)

    def add(self, number: int, elapsed_s: float, cpu_s: float, answers: dict[str, str]) -> None:
        """More of a round."""
        before = self.rounds.get(number, (0.0, 0.0, 0))
        self.rounds[number] = before[0] + elapsed_s, before[1] + cpu_s, before[2] + len(answers)
        self.answers |= answers

    def a_question(self, rounds: Iterable[int]) -> tuple[float, float]:
        """Seconds on the wall and of processors for a question of these rounds."""
        elapsed, cpu, count = (sum(parts) for parts in zip(*(self.rounds[number] for number in rounds), strict=True))
        return elapsed / count, cpu / count

    def same(self, other: Clock) -> float:
        """The share of this clock's answers that the other has too."""
        return float(np.mean([words(text) == words(other.answers[id]) for id, text in self.answers.items()]))


def timed(ask: Callable[[], dict[str, str]], pids: Sequence[int] = ()) -> tuple[float, float, dict[str, str]]:
    """Seconds on the wall and of processors in these processes (none: in children that ended meanwhile), and the answers."""
    begun, before = time.perf_counter(), _cpu_s(pids)
    answers = ask()
    return time.perf_counter() - begun, _cpu_s(pids) - before, answers


def _cpu_s(pids: Sequence[int]) -> float:
    times = os.times()
    spent = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(t.user + t.system for t in spent)) if pids else times.children_user + times.children_system


@contextmanager
def server(binary: Path, artifact: Artifact, threads: int, slots: int) -> Iterator[tuple[str, int]]:
    """A llama-server's address and process, ready."""
    port = free_port()
    cells = slots * (artifact.manifest.vision.image_tokens + 96) if slots > 1 else 2048
    command = [str(binary), "-m", str(artifact.llm_path), "--mmproj", str(artifact.mmproj_path), "-c", str(cells), "-np", str(slots)]
    command += ["--port", str(port), "-t", str(threads), "-ngl", "0", "--no-mmproj-offload", "--no-warmup"]
    with tempfile.TemporaryFile() as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_ready(url, process)
            yield url, process.pid
        finally:
            process.terminate()


def prepared_png(artifact: Artifact, path: Path) -> bytes:
    """The image at the tower's own size, so that every program sees the same pixels."""
    data = io.BytesIO()
    Image.fromarray(prepare(load_image(path), artifact.manifest.image)).save(data, "PNG")
    return data.getvalue()


def ask_server(url: str, link: str, question: str, separator: str) -> str:
    """One question over HTTP."""
    content = [{"type": "image_url", "image_url": {"url": link}}, {"type": "text", "text": f"{separator}{question}"}]
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": MAX_TOKENS, "cache_prompt": True}
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=HTTP_TIMEOUT_S) as reply:
        return str(json.load(reply)["choices"][0]["message"]["content"]).strip()


def time_server(at: tuple[str, int], artifact: Artifact, samples: Sequence[Sample], clients: int) -> tuple[float, float, dict[str, str]]:
    """The questions about one image, by so many clients at once."""
    url, pid = at
    # The server puts nothing between an image and the text, where training had the template's separator.
    separator = artifact.manifest.template.image_separator

    def ask() -> dict[str, str]:
        link = "data:image/png;base64," + base64.b64encode(prepared_png(artifact, _image(samples))).decode()
        with ThreadPoolExecutor(clients) as pool:
            texts = list(pool.map(lambda s: ask_server(url, link, s.question, separator), samples))
        return {s.id: text for s, text in zip(samples, texts, strict=True)}

    return timed(ask, [pid])


def time_ours(target: EngineTarget, groups: Sequence[Sequence[Sample]]) -> tuple[float, float, dict[str, str]]:
    """The same by the runner: a group an image, as many images at once as there are engines."""
    samples = [s for group in groups for s in group]
    return timed(lambda: {s.id: r.text for s, r in zip(samples, run(target, samples), strict=True)}, target.pids)


def time_cli(binary: Path, artifact: Artifact, sample: Sample, threads: int) -> tuple[float, float, dict[str, str]]:
    """One question by a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".png") as image:
        image.write(prepared_png(artifact, _image([sample])))
        image.flush()
        command = [str(binary), "-m", str(artifact.llm_path), "--mmproj", str(artifact.mmproj_path), "--image", image.name, "--jinja"]
        command += ["-p", sample.question, "-n", str(MAX_TOKENS), "-c", "2048", "--temp", "0", "-t", str(threads)]
        command += ["-ngl", "0", "--no-mmproj-offload"]

        def ask() -> dict[str, str]:
            done = subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
            return {sample.id: done.stdout.strip()}

        return timed(ask)


def _image(samples: Sequence[Sample]) -> Path:
    path = samples[0].image
    assert path is not None  # the set is filtered for it
    return path


def measure(
    artifact: Artifact, groups: Sequence[Sequence[Sample]], bin_dir: Path, threads: int, slots_images: int, cli_questions: int
) -> list[Clock]:
    """All programs in turn, image by image."""
    ours, one = Clock("edgemed eval"), Clock("llama-server, one at a time")
    many, cli = Clock(f"llama-server, {SLOTS} at a time"), Clock("llama-mtmd-cli, a process a question")
    with ExitStack() as stack:
        target = stack.enter_context(EngineTarget(artifact, workers=threads))
        single = stack.enter_context(server(bin_dir / "llama-server", artifact, threads, 1))
        parallel = stack.enter_context(server(bin_dir / "llama-server", artifact, threads, SLOTS))
        for start in range(0, len(groups), ROUND):
            part = groups[start : start + ROUND]
            ours.add(start, *time_ours(target, part))
            for samples in part:
                one.add(start, *time_server(single, artifact, samples, 1))
            for samples in part if start < slots_images else ():
                many.add(start, *time_server(parallel, artifact, samples, SLOTS))
            if len(cli.answers) < cli_questions:
                cli.add(start, *time_cli(bin_dir / "llama-mtmd-cli", artifact, part[0][0], threads))
            print(f"{start + len(part)} of {len(groups)} images", file=sys.stderr, flush=True)
    return [clock for clock in (ours, one, many, cli) if clock.answers]


def row_of(clock: Clock, ours: Clock) -> dict[str, Any]:
    """A program beside ours, on the rounds that it had."""
    (elapsed, cpu), (our_elapsed, our_cpu) = clock.a_question(clock.rounds), ours.a_question(clock.rounds)
    return {
        "program": clock.program,
        "questions": len(clock.answers),
        "seconds": round(elapsed * len(clock.answers), 2),
        "per_minute": round(60 / elapsed, 1),
        "ours_is_times": round(elapsed / our_elapsed, 2),
        "cpu_s_a_question": round(cpu, 3),
        "in_cpu_s": round(cpu / our_cpu, 2),
        "same_answers": round(clock.same(ours), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--bin-dir", type=Path, required=True)
    parser.add_argument("--images", type=int, help="the first so many; all where not given")
    parser.add_argument("--slots-images", type=int, default=ROUND, help="whole turns until so many; 0: none")
    parser.add_argument("--cli-questions", type=int, default=6)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    samples = [s for s in load_named(parse_dataset(args.dataset, "validate")) if s.image]
    groups = [[samples[k] for k in group.places] for group in group_samples(samples)][: args.images]
    clocks = measure(load_artifact(args.artifact), groups, args.bin_dir, args.threads, args.slots_images, args.cli_questions)
    rows = [row_of(clock, clocks[0]) for clock in clocks]
    print_table(f"{args.artifact.name}, {args.threads} threads", tuple(rows[0]), [[str(v) for v in row.values()] for row in rows])
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
