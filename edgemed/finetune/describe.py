"""What a run is, and what came of it: the fingerprint by which a resume is allowed, and run.json.

Knows no folder; workspace.py compares fingerprints, export.py writes run.json.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgemed.core.files import sha256_file
from edgemed.core.versions import package_version
from edgemed.data import Sample, hash_images, hash_samples
from edgemed.finetune.recipe import Recipe
from edgemed.finetune.trainer import StageTrainer

# What may differ when a run goes on: where things lie, and what leaves the result alone.
_FREE_KEYS = {
    "recipe": ("output", "model", "features"),
    "join": ("llm", "tower"),
    "lora": ("adapter",),
    "optim": ("workers", "save_steps"),
    "data": ("path",),
}

Sets = Sequence[tuple[str, int, list[Sample]]]


def describe_run(recipe: Recipe, sets: Sets) -> dict[str, Any]:
    """What a run is: its recipe without paths, and hashes of its data and of the weights it begins with."""
    data = recipe.model_dump(mode="json")
    tables = [("recipe", data), ("optim", data["optim"]), *(("data", d) for d in data["data"])]
    tables += [(name, data[name]) for name in ("join", "lora") if data[name]]
    for name, table in tables:
        for key in _FREE_KEYS[name]:
            table.pop(key)
    data["data"] = {str(i): d for i, d in enumerate(data["data"])}
    folders = [recipe.model] if recipe.model else [recipe.join.llm, recipe.join.tower] if recipe.join else []
    if recipe.lora and recipe.lora.adapter:
        folders.append(recipe.lora.adapter)
    return {"recipe": data, "data": _describe_data(sets), "source": {str(i): _hash_weights(f) for i, f in enumerate(folders)}}


def _describe_data(sets: Sets) -> dict[str, Any]:
    return {str(i): {"sha256": hash_samples(samples), "images": hash_images(samples)} for i, (_, _, samples) in enumerate(sets)}


def _hash_weights(folder: Path) -> dict[str, str]:
    files = [p for pattern in ("config.json", "*.safetensors", "*.bin") for p in sorted(folder.glob(pattern))]
    return {p.name: sha256_file(p) for p in files}


def describe_code() -> dict[str, Any]:
    """Which code trains. Asked before training: nothing that can fail stands between its end and its weights' being saved."""
    libraries = ("transformers", "accelerate", "peft", "numpy", "pillow")
    return {
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0], **{name: package_version(name) for name in libraries}},
        "edgemed": {"version": package_version("edgemed"), "revision": _revision()},
    }


def describe_result(
    recipe: Recipe, sets: Sets, fingerprint: dict[str, Any], code: dict[str, Any], trainer: StageTrainer, result: Any
) -> dict[str, Any]:
    """run.json: everything that made this checkpoint. `code`: of `describe_code`."""
    history = [e for e in trainer.state.log_history if "loss" in e]
    keys = ("step", "loss", "learning_rate", "grad_norm")
    return {
        "recipe": recipe.model_dump(mode="json"),
        "data": [
            {"name": name, "rows": len(samples), "split": d.split, "sha256": hash_samples(samples)}
            for d, (name, _, samples) in zip(recipe.data, sets, strict=True)
        ],
        "fingerprint": fingerprint,
        "steps": result.global_step,
        "seconds": round(trainer.clock.spent_s, 1),
        "processes": trainer.accelerator.num_processes,
        "pieces": trainer.pieces,
        "loss": [{k: e[k] for k in keys if k in e} for e in history],
        **code,
    }


def _revision() -> str | None:
    """The git commit of this code, where it is a checkout."""
    here = Path(__file__).parent
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() if found.returncode == 0 else None
