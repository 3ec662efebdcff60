"""From a trained model in memory to the stage's folder: an HF checkpoint in which nothing is lost.

Weights that did not learn are taken from where training began, bit by bit, even where training kept them in fewer bits; adapters
are merged in float32. Knows no Trainer.
"""

from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from edgemed.core.contract import Contract, save_contract, save_processor
from edgemed.core.conversation import find_template
from edgemed.core.errors import RecipeError
from edgemed.core.files import save_text
from edgemed.finetune.model import load_full, merged
from edgemed.finetune.recipe import Recipe
from edgemed.finetune.workspace import RUN_NAME, writing
from edgemed.report.plots import save_curve

_TYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_checkpoint(recipe: Recipe, model: Any, tokenizer: Any, run: dict[str, Any], text: str | None = None) -> None:
    """Write the stage's folder; run.json comes last and marks it complete. `text`: the recipe's own file, kept as recipe.toml.

    Raises ResourceError (disk), RecipeError (weights beyond save_dtype's range).
    """
    out = recipe.output
    with writing(out / RUN_NAME, (SafetensorError, RuntimeError)):
        out.mkdir(parents=True, exist_ok=True)
        (out / RUN_NAME).unlink(missing_ok=True)
        if recipe.lora:
            model.save_pretrained(out / "adapter")
        model = to_saved_type(exact_model(recipe, model, tokenizer), recipe)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
        save_preparation(out, recipe)
        save_picture(out, run)
        if text is not None:
            save_text(out / "recipe.toml", text)
        save_text(out / RUN_NAME, json.dumps(run, indent=1))


def save_picture(out: Path, run: dict[str, Any]) -> None:
    """loss.png, where the `plots` extra is there; run.json has the same numbers."""
    points = [(float(e["step"]), float(e["loss"])) for e in run.get("loss", [])]
    if points and importlib.util.find_spec("matplotlib") is not None:
        save_curve(out / "loss.png", f"{out.name}: {run['recipe']['stage']}", "step", "loss", points)


def exact_model(recipe: Recipe, model: Any, tokenizer: Any) -> Any:
    """The trained model in float32, adapters merged, frozen weights as they were before training may have rounded them."""
    if recipe.lora:
        return merged(model, recipe, tokenizer, recipe.output / "adapter")
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    full = load_full(recipe, tokenizer)
    learnt = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in full.named_parameters():
            if name in learnt:
                parameter.copy_(learnt[name])
    return full


def to_saved_type(model: Any, recipe: Recipe) -> Any:
    """The model in `save_dtype`. Raises RecipeError where a weight does not fit its range."""
    dtype = source_type(recipe) if recipe.save_dtype == "source" else getattr(torch, recipe.save_dtype)
    limit = torch.finfo(dtype).max
    for name, parameter in model.named_parameters():
        if not bool((parameter.abs() <= limit).all()):
            raise RecipeError(
                f"Expected weights within the range of {str(dtype).removeprefix('torch.')}, found others in {name}.",
                'Set save_dtype = "bfloat16" in the recipe and run the same command again.',
            )
    return model.to(dtype)


def source_type(recipe: Recipe) -> torch.dtype:
    """The widest type among the weights that training began with (the language model's, where parts are joined)."""
    folder = recipe.join.llm if recipe.join else recipe.model
    assert folder is not None  # load_recipe saw to it
    return widest_type(folder)


def widest_type(folder: Path) -> torch.dtype:
    """The type that holds every weight in a folder's safetensors; float32 for other files, which is never wrong."""
    found: set[torch.dtype] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {_TYPES[kind] for name in file.keys() if (kind := file.get_slice(name).get_dtype()) in _TYPES}
    return functools.reduce(torch.promote_types, found) if found else torch.float32


def save_preparation(out: Path, recipe: Recipe) -> None:
    """preprocessor_config.json for HF, and edgemed.json: image preparation, template and rounding exactly as trained."""
    save_processor(out, recipe.image)
    rounded = recipe.lora is not None and recipe.lora.rounding > 0
    save_contract(out, Contract(image=recipe.image, template=find_template(recipe.template), rounded=rounded))
