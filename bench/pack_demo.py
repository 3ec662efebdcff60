"""Turns a checkpoint of bench.train_demo into the files that ship: edgemed/demo/adapter.gguf and mmproj.gguf, both at 8 bits, and run.json.

    python -m bench.pack_demo CHECKPOINT --base SmolLM2-135M-Instruct.Q4_1.gguf

CHECKPOINT is the vqa stage's folder with its `adapter/`. The base itself is not shipped: `edgemed models pull edgemed-demo` gets it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from converters.adapters import save_gguf_adapter
from converters.convert import convert
from converters.readers import open_checkpoint
from converters.readers.gguf import gguf_llm
from converters.readers.gguf_file import open_gguf
from converters.recipes import Recipe
from edgemed.core.files import save_text, sha256_file
from edgemed.core.units import format_bytes

DEMO = Path(__file__).parents[1] / "edgemed" / "demo"
LIMIT_BYTES = 34_000_000
# What of a run.json tells how the files were made; the rest is there to resume by.
TOLD = ("recipe", "data", "steps", "seconds", "processes", "loss", "versions", "join", "probe")


def tell_run(run: dict[str, Any]) -> dict[str, Any]:
    """A run.json as it ships: what TOLD lists, of the stages before it and of those it is the mean of, too, without the folders of the
    machine that trained."""
    told = {key: _without_folders(run[key]) for key in TOLD if key in run}
    stages = {name: tell_run(stage) for name, stage in run.get("stages", {}).items()}
    averaged = [tell_run(each) for each in run.get("averaged", [])]
    return told | ({"averaged": averaged} if averaged else {}) | ({"stages": stages} if stages else {})


def _without_folders(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return PurePosixPath(value).name if isinstance(value, str) and value.startswith("/") else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    args = parser.parse_args()
    save_gguf_adapter(args.checkpoint / "adapter", DEMO / "adapter.gguf", gguf_llm(open_gguf(args.base)), quant="Q8_0")
    with tempfile.TemporaryDirectory() as folder:
        artifact = convert(open_checkpoint(args.checkpoint), Path(folder) / "artifact", Recipe.of(bits=8))
        shutil.copyfile(artifact.mmproj_path, DEMO / "mmproj.gguf")
    run = json.loads((args.checkpoint / "run.json").read_text())
    save_text(DEMO / "run.json", json.dumps(tell_run(run)) + "\n")
    for name in ("adapter.gguf", "mmproj.gguf"):
        print(f'{name}: set its sha256 in models.toml to "{sha256_file(DEMO / name)}"')
    total = sum(path.stat().st_size for path in DEMO.iterdir() if path.is_file())
    print(f"{DEMO}: {format_bytes(total)} of {format_bytes(LIMIT_BYTES)}")
    if total > LIMIT_BYTES:
        raise SystemExit("The demo's files are larger than what may ship.")


if __name__ == "__main__":
    main()
