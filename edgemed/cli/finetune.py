"""`edgemed finetune`: a model from parts, and the three training stages, each from one settings file.

Under torchrun or `accelerate launch` the same command runs in every process; the first one speaks.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgemed.cli.options import (
    Config,
    FeatureLayer,
    ImageMode,
    ImageSize,
    ImageToken,
    Json,
    LlmFolder,
    NewOut,
    ProjectorSeed,
    Quiet,
    Template,
    TowerFolder,
)
from edgemed.cli.output import Output

if TYPE_CHECKING:
    from edgemed.finetune import Progress

app = typer.Typer(help="Train a model in stages (train extra).", no_args_is_help=True, rich_markup_mode=None)


@app.command("new")
def new(
    llm: LlmFolder,
    tower: TowerFolder,
    out: NewOut,
    template: Template = None,
    image_mode: ImageMode = None,
    image_token: ImageToken = "<image>",
    feature_layer: FeatureLayer = -2,
    image_size: ImageSize = None,
    seed: ProjectorSeed = 0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Join a language model and a vision tower by a fresh projector, for the align stage."""
    from edgemed.finetune import quieten, require_extra

    require_extra()
    quieten()
    from edgemed.finetune.joining import new_model

    sink = Output(json=json, quiet=quiet)
    folder = new_model(
        llm,
        tower,
        out,
        template=template,
        image_mode=image_mode or "pad",
        image_token=image_token,
        feature_layer=feature_layer,
        image_size_px=image_size,
        seed=seed,
    )
    sink.text(str(folder))
    sink.note(f'Train its projector with: edgemed finetune align --config run.toml, where model = "{folder}"')
    sink.result({"checkpoint": folder})


@app.command("align")
def align(config: Config, json: Json = False, quiet: Quiet = False) -> None:
    """Stage 1: train the projector on image and caption pairs."""
    _run("align", config, json, quiet)


@app.command("instruct")
def instruct(config: Config, json: Json = False, quiet: Quiet = False) -> None:
    """Stage 2: train projector and language model on conversations."""
    _run("instruct", config, json, quiet)


@app.command("vqa")
def vqa(config: Config, json: Json = False, quiet: Quiet = False) -> None:
    """Stage 3: train on question and answer sets, in full or as LoRA."""
    _run("vqa", config, json, quiet)


def _run(stage: str, config: Path, json: bool, quiet: bool) -> None:
    from edgemed.finetune import StageInterrupted, run_stage

    main = os.environ.get("RANK", "0") == "0"
    out = Output(json=json and main, quiet=quiet or not main)
    try:
        with out.steps() as show:
            folder = run_stage(stage, config, lambda p: show(p.step, p.steps, describe(p)), lambda what, n, of: show(n, of, what))
    except StageInterrupted as stop:
        out.note(f"{stop} The same command goes on from there.")
        raise
    if main:
        out.text(str(folder))
        out.note(f"Convert it with: edgemed convert {folder} --bits 4")
        out.result({"stage": stage, "checkpoint": folder})


def describe(progress: Progress) -> str:
    """Loss, speed, what is left and memory, in a line."""
    from edgemed.core.units import format_bytes

    minutes, seconds = divmod(round(progress.eta_s), 60)
    hours, minutes = divmod(minutes, 60)
    left = f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    memory = f" · {format_bytes(progress.memory_bytes)}" if progress.memory_bytes else ""
    return f"loss {progress.loss:.4g} · {progress.samples_per_s:.3g} samples/s · {left} left{memory}"
