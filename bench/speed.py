"""Decode speed beside llama-bench, and how much sooner a second question about one image is answered.

    python -m bench.speed [DIR] --bin-dir LLAMA_CPP_BIN --rounds 5

Both run the same file on the same build's flags with the same threads, at the same depth (`-d`: the prompt's tokens, image included),
one after the other in every round; machines drift, so only the ratio of each round counts. First-token times are of distinct images,
so that nothing is cached for the first question. Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path

import numpy as np

from edgemed.core.conversation import Turn
from edgemed.core.manifest import load_artifact
from edgemed.core.paths import artifacts_dir
from edgemed.core.probe import probe_pixels
from runtimes.engine import Engine, prepare_request
from runtimes.messages import EngineSettings, Finished, PreparedImage

NEW_TOKENS = 64
FIRST, SECOND = "What modality is used to take this image?", "Is there an abnormality in this image?"


def llama_bench(binary: Path, model: Path, depth: int, threads: int) -> float:
    """Tokens per second of llama-bench's text generation after `depth` tokens."""
    command = [
        str(binary),
        "-m",
        str(model),
        "-p",
        "0",
        "-n",
        str(NEW_TOKENS),
        "-d",
        str(depth),
        "-t",
        str(threads),
        "-r",
        "1",
        "-o",
        "json",
    ]
    result = subprocess.run([*command, "-ngl", "0"], check=True, capture_output=True, text=True)
    return float(json.loads(result.stdout)[0]["avg_ts"])


def image(size_px: int, seed: int) -> PreparedImage:
    """The probe's image, rolled, so that each seed has other pixels."""
    return PreparedImage(np.roll(probe_pixels(size_px), 7 * seed, axis=0).tobytes(), size_px)


def ask(engine: Engine, question: str, picture: PreparedImage, tokens: int) -> Finished:
    """One answer of exactly `tokens` tokens."""
    turns = (Turn("user", question, images=1),)
    for event in engine.submit(prepare_request(engine.artifact, turns, [picture], max_tokens=tokens, ignore_end=True)):
        if isinstance(event, Finished):
            return event
    raise RuntimeError("The engine ended without an answer.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=artifacts_dir() / "edgemed-demo-4bit")
    parser.add_argument("--bin-dir", type=Path, required=True, help="folder with llama-bench of the same llama.cpp")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    artifact = load_artifact(args.folder)
    size_px = artifact.manifest.image.size_px
    rows = []
    for number in range(args.rounds):
        # The engine is closed while the peer runs: its sleeping threads cost nothing, but its memory is in the caches.
        with Engine.open(artifact, EngineSettings(context_tokens=1024, threads=args.threads, gpu_layers=0)) as engine:
            ask(engine, FIRST, image(size_px, 100 + number), 4)
            first = ask(engine, FIRST, image(size_px, number), NEW_TOKENS)
            second = ask(engine, SECOND, image(size_px, number), 2)
        peer = llama_bench(args.bin_dir / "llama-bench", artifact.llm_path, first.usage.prompt_tokens, args.threads)
        rows.append(
            {
                "decode_tokens_per_s": first.timings.decode_tokens_per_s,
                "llama_bench_tokens_per_s": peer,
                "decode_ratio": first.timings.decode_tokens_per_s / peer,
                "first_token_ratio": first.timings.first_token_s / second.timings.first_token_s,
                "depth": first.usage.prompt_tokens,
            }
        )
        print("  ".join(f"{k} {v:.2f}" for k, v in rows[-1].items()), flush=True)
    medians = {k: statistics.median(row[k] for row in rows) for k in rows[0]}
    print(json.dumps({"artifact": artifact.folder.name, "rounds": args.rounds, "threads": args.threads, "median": medians}))


if __name__ == "__main__":
    main()
