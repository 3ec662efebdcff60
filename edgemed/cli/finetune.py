"""`edgemed finetune`: the three training stages, each from one settings file."""

from __future__ import annotations

from pathlib import Path

import typer

from edgemed.cli.options import Config, Json, Quiet
from edgemed.cli.output import Output

app = typer.Typer(help="Train a model in stages (train extra).", no_args_is_help=True, rich_markup_mode=None)


@app.command("align")
def align(config: Config, json: Json = False, quiet: Quiet = False) -> None:
    """Stage 1: train the projector on image and caption pairs."""
    _run("align", config, Output(json=json, quiet=quiet))


@app.command("instruct")
def instruct(config: Config, json: Json = False, quiet: Quiet = False) -> None:
    """Stage 2: train projector and language model on conversations."""
    _run("instruct", config, Output(json=json, quiet=quiet))


@app.command("vqa")
def vqa(config: Config, json: Json = False, quiet: Quiet = False) -> None:
    """Stage 3: train on question and answer sets, in full or as LoRA."""
    _run("vqa", config, Output(json=json, quiet=quiet))


def _run(stage: str, config: Path, out: Output) -> None:
    from edgemed.finetune import run_stage

    folder = run_stage(stage, config)
    out.text(str(folder))
    out.note(f"Convert it with: edgemed convert {folder} --bits 4")
    out.result({"stage": stage, "checkpoint": folder})
