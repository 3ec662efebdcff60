"""Fine-tuning in the paper's three stages, each a recipe file in, an HF checkpoint and run.json out.

    run_stage("vqa", Path("run.toml")) -> Path

Needs the `train` extra. Knows nothing about GGUF: `edgemed convert` reads what this writes.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from edgemed.core.errors import MissingExtraError


def run_stage(stage: str, config: Path) -> Path:
    """Run `stage` ("align", "instruct" or "vqa") with a recipe; returns the checkpoint's folder. Raises RecipeError, DatasetError."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft", "accelerate")):
        raise MissingExtraError.of("Fine-tuning", "train")
    from edgemed.finetune.recipe import load_recipe
    from edgemed.finetune.stage import train

    return train(load_recipe(stage, config))
