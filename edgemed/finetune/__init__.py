"""Fine-tuning in the paper's three stages, each a recipe file in, an HF checkpoint and run.json out.

    run_stage("vqa", Path("run.toml")) -> Path          # goes on where it was interrupted

Needs the `train` extra. Knows nothing about GGUF: `edgemed convert` reads what this writes.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

from edgemed.core.errors import MissingExtraError
from edgemed.finetune.interrupted import StageInterrupted
from edgemed.finetune.progress import Prepare, Progress, Report

__all__ = ["Prepare", "Progress", "Report", "StageInterrupted", "quieten", "require_extra", "run_stage"]


def require_extra() -> None:
    """Raises MissingExtraError where the `train` extra is not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers", "peft", "accelerate")):
        raise MissingExtraError.of("Fine-tuning", "train")


def quieten() -> None:
    """The extra's libraries stay quiet, since `Report` tells how far it is."""
    import warnings

    from transformers.utils import logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def run_stage(stage: str, config: Path, report: Report | None = None, prepare: Prepare | None = None) -> Path:
    """Run `stage` ("align", "instruct" or "vqa") with a recipe; returns the checkpoint's folder. `report` is called after every step.
    `prepare` is told (what, done, total) of what comes before the first one.

    Raises RecipeError, DatasetError, CheckpointError, ResourceError, MissingExtraError, StageInterrupted.
    """
    require_extra()
    from edgemed.finetune.recipe import load_recipe

    recipe = load_recipe(stage, config)  # a typo is told before seconds go into importing torch
    quieten()
    from edgemed.finetune.export import save_checkpoint
    from edgemed.finetune.stage import train

    return train(recipe, report, partial(save_checkpoint, text=config.read_text(encoding="utf-8")), prepare)
