"""Conversion to 4 bits, side by side with llama.cpp's converter and quantiser, in one run on one machine.

    python -m bench.full_width tiny /data/tiny
    python -m bench.conversion /data/tiny --llama-cpp-src vendor/llama.cpp --bin-dir build/bin

Compared is the LLM's part alone, because llama.cpp's converter refuses such towers: ours in one process against
`convert_hf_to_gguf.py` and then `llama-quantize Q4_K_M`. Our whole conversion follows, with tower, certificate and hashes. Each is
a process of its own; its time includes Python's start. Memory is the sum of RssAnon over the process tree (Linux), sampled from
outside every 20 ms, so a shorter peak can be missed. The last line is JSON. Knows nothing about quality.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil

from edgemed.core.units import format_bytes, format_duration
from edgemed.report.tables import print_table

SAMPLE_S = 0.02


@dataclass(frozen=True)
class Run:
    """One process, from start to end."""

    what: str
    time_s: float
    # User and system time of the process tree: what other load on the machine changes least.
    cpu_s: float
    peak_anonymous_bytes: int
    output_bytes: int


def anonymous_bytes(pid: int) -> int:
    """RssAnon of a process and all its children."""
    try:
        root = psutil.Process(pid)
        pids = [pid, *(c.pid for c in root.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0
    return sum(_rss_anon(p) for p in pids)


def _rss_anon(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as f:
            for line in f:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0  # ended meanwhile
    return 0


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(what: str, command: Sequence[str], outputs: Sequence[Path], log: Path, env: dict[str, str]) -> Run:
    """Run a command and watch its memory. Exits with its log's end where it fails."""
    peak = 0
    cpu = _children_cpu_s()
    start = time.perf_counter()
    with log.open("wb") as f:
        process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, env=env)
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(SAMPLE_S):
                peak = max(peak, anonymous_bytes(process.pid))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        code = process.wait()
        elapsed = time.perf_counter() - start
        ended.set()
        watcher.join()
    if code:
        sys.exit(f"{what} failed with exit code {code}; its last lines:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:]))
    return Run(what, elapsed, _children_cpu_s() - cpu, peak, sum(p.stat().st_size for p in outputs))


def convert_llm(source: Path, target: Path, threads: int) -> None:
    """Our LLM part alone, as the whole conversion does it."""
    from converters.convert import plan_llm
    from converters.readers import open_checkpoint
    from converters.recipes import Recipe
    from converters.writer import write_gguf

    plan = plan_llm(open_checkpoint(source), Recipe.of(bits=4))
    write_gguf(target, plan.arch, plan.metadata, plan.tensors, threads=threads)
    with target.open("rb+") as f:
        os.fsync(f.fileno())


def convert_whole(source: Path, folder: Path, threads: int, bits: int) -> None:
    """Our whole conversion."""
    from converters.convert import convert
    from converters.readers import open_checkpoint
    from converters.recipes import Recipe

    artifact = convert(open_checkpoint(source), folder, Recipe.of(bits=bits), threads=threads)
    for note in artifact.manifest.source.notes:
        print(note)


def own_command(source: Path, work: Path, threads: int) -> list[str]:
    """This script, to be given a step."""
    work.mkdir(parents=True, exist_ok=True)
    return [sys.executable, "-m", "bench.conversion", str(source), "--threads", str(threads), "--work", str(work)]


def compare(source: Path, work: Path, llama_cpp: Path, bin_dir: Path, threads: int, rounds: int, whole: Sequence[int]) -> list[list[Run]]:
    """`rounds` times: ours, the peer's two steps; then our whole conversions."""
    env = dict(os.environ)
    own = own_command(source, work, threads)
    convert = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(source), "--outfile", str(work / "peer-16.gguf")]
    peer_env = env | {"LD_LIBRARY_PATH": f"{bin_dir}{os.pathsep}{env.get('LD_LIBRARY_PATH', '')}"}
    quantise = [str(bin_dir / "llama-quantize"), str(work / "peer-16.gguf"), str(work / "peer-4.gguf"), "Q4_K_M", str(threads)]
    out = []
    for i in range(rounds):
        runs = [measure("ours, LLM part", [*own, "--step", "llm"], [work / "ours-4.gguf"], work / "ours.log", env)]
        runs.append(measure("llama.cpp, convert_hf_to_gguf.py", convert, [work / "peer-16.gguf"], work / "peer-convert.log", env))
        runs.append(measure("llama.cpp, llama-quantize", quantise, [work / "peer-4.gguf"], work / "peer-quantize.log", peer_env))
        out.append(runs)
        print(f"round {i + 1}: " + ", ".join(f"{r.what} {format_duration(r.time_s)}" for r in runs), file=sys.stderr)
    out[-1] += [measure_whole(own, work, bits, env) for bits in whole]
    return out


def measure_whole(own: Sequence[str], work: Path, bits: int, env: dict[str, str]) -> Run:
    """Our whole conversion, into WORK/whole-BITS."""
    folder = work / f"whole-{bits}"
    shutil.rmtree(folder, ignore_errors=True)
    run = measure(f"ours, whole, {bits} bits", [*own, "--step", f"whole-{bits}"], [], work / f"whole-{bits}.log", env)
    return replace(run, output_bytes=sum(p.stat().st_size for p in folder.glob("*.gguf")))


def report(rounds: list[list[Run]], threads: int) -> dict[str, object]:
    """Print the table; the best round counts on both sides, since other load only ever adds time."""
    best = [min((runs[i] for runs in rounds), key=lambda r: r.time_s) for i in range(3)] + rounds[-1][3:]
    rows = [
        (r.what, format_duration(r.time_s), format_duration(r.cpu_s), format_bytes(r.peak_anonymous_bytes), format_bytes(r.output_bytes))
        for r in best
    ]
    print_table(
        f"Conversion to 4 bits, {threads} threads, best of {len(rounds)}",
        ("step", "time", "CPU time", "peak anonymous memory", "output"),
        rows,
    )
    ours, convert, quantise = best[:3]
    peer = convert.time_s + quantise.time_s
    result = {
        "threads": threads,
        "rounds": len(rounds),
        "time_ratio_llm": round(ours.time_s / peer, 4),
        "cpu_ratio_llm": round(ours.cpu_s / (convert.cpu_s + quantise.cpu_s), 4),
        "time_ratio_llm_each_round": [round(r[0].time_s / (r[1].time_s + r[2].time_s), 4) for r in rounds],
        "peak_anonymous_bytes_ours": max(r.peak_anonymous_bytes for runs in rounds for r in runs if r.what.startswith("ours")),
        "peak_anonymous_bytes_peer": max(convert.peak_anonymous_bytes, quantise.peak_anonymous_bytes),
        "runs": [asdict(r) for r in best],
    }
    print(f"LLM part: {ours.time_s:.1f} s against {convert.time_s:.1f} + {quantise.time_s:.1f} s, ratio {ours.time_s / peer:.3f}")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.conversion", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a checkpoint, for example of bench.full_width")
    parser.add_argument("--llama-cpp-src", type=Path, help="llama.cpp's source tree, of the version in llama-cpp-python")
    parser.add_argument("--bin-dir", type=Path, help="folder of its llama-quantize")
    parser.add_argument("--work", type=Path, default=Path("conversion-bench"), help="folder for outputs")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--llm-only", action="store_true", help="leave out our whole conversions at 4 and 8 bits")
    parser.add_argument("--ours-only", type=int, choices=(4, 8), help="our whole conversion at so many bits alone, no peer")
    parser.add_argument("--step", choices=("llm", "whole-4", "whole-8"), help=argparse.SUPPRESS)  # how the script runs itself
    arguments = parser.parse_args()
    if arguments.step == "llm":
        convert_llm(arguments.source, arguments.work / "ours-4.gguf", arguments.threads)
    elif arguments.step:
        bits = int(arguments.step[-1])
        convert_whole(arguments.source, arguments.work / f"whole-{bits}", arguments.threads, bits)
    elif arguments.ours_only:
        own = own_command(arguments.source, arguments.work, arguments.threads)
        print(json.dumps(asdict(measure_whole(own, arguments.work, arguments.ours_only, dict(os.environ)))))
    else:
        if not (arguments.llama_cpp_src and arguments.bin_dir):
            parser.error("--llama-cpp-src and --bin-dir are needed")
        whole = () if arguments.llm_only else (4, 8)
        rounds = compare(
            arguments.source, arguments.work, arguments.llama_cpp_src, arguments.bin_dir, arguments.threads, arguments.rounds, whole
        )
        print(json.dumps(report(rounds, arguments.threads)))


if __name__ == "__main__":
    main()
