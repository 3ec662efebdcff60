"""A new model out of parts: a bare language model, a vision tower, and a fresh projector between them.

    new_model(Path("TinyLlama"), Path("siglip"), Path("out/base"))

The result is an HF checkpoint with edgemed.json, where the align stage starts. Its projector says nothing yet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from transformers import AutoConfig, AutoTokenizer

from edgemed.core.contract import Contract, checkpoint_errors, save_contract, save_processor
from edgemed.core.conversation import IMAGE_MARKER, find_template
from edgemed.core.errors import CheckpointError, InputError
from edgemed.core.files import atomic_folder, os_errors
from edgemed.core.images import ImagePreparation
from edgemed.finetune.export import widest_type
from edgemed.finetune.model import join
from edgemed.finetune.recipe import JoinRecipe


def new_model(
    llm: Path,
    tower: Path,
    out: Path,
    *,
    template: str | None = None,
    image_mode: str = "pad",
    image_token: str = IMAGE_MARKER,
    feature_layer: int = -2,
    image_size_px: int | None = None,
    seed: int = 0,
) -> Path:
    """Join and save; returns `out`. Weights keep the widest type of both parts.

    template: of edgemed/core/conversation.py; chatml where the tokenizer has its tokens, else v1. image_token: added to the tokenizer
    where it is not there. A tower with the exact GELU is set to the tanh form, the only one of the two that llama.cpp computes, before
    anything learns on it. image_size_px: another than the tower's own, a multiple of its patch size. Raises CheckpointError, RecipeError
    (such a size), InputError (an `out` that holds files).
    """
    for path in (llm, tower):
        if not (path / "config.json").is_file():
            raise CheckpointError(f"Expected an HF checkpoint at {path}, found no config.json there.", "Check the path.")
    with checkpoint_errors(llm):
        tokenizer = AutoTokenizer.from_pretrained(llm)
    chosen = find_template(template or ("chatml" if "<|im_end|>" in tokenizer.get_vocab() else "v1"))
    image = tower_preparation(tower, image_mode)
    if image_size_px:
        image = image.model_copy(update={"size_px": image_size_px})
    if image_token not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"additional_special_tokens": [image_token]}, replace_extra_special_tokens=False)
    transformers.set_seed(seed)
    with atomic_folder(out) as part:
        tanh = "gelu_pytorch_tanh" if _activation(tower) == "gelu" else None
        parts = JoinRecipe(
            llm=llm,
            tower=tower,
            image_token=image_token,
            feature_layer=feature_layer,
            tower_activation=tanh,
            image_size_px=image_size_px,
        )
        model = join(parts, tokenizer)
        if image.size_px != model.config.vision_config.image_size:
            raise CheckpointError(
                f"Expected images of {model.config.vision_config.image_size} px in {tower / 'preprocessor_config.json'}, found"
                f" {image.size_px}.",
                "Correct the file.",
            )
        model.to(torch.promote_types(widest_type(llm), widest_type(tower))).save_pretrained(part)
        tokenizer.save_pretrained(part)
        save_processor(part, image)
        save_contract(part, Contract(image=image, template=chosen))
    return out


def _activation(tower: Path) -> str:
    with checkpoint_errors(tower):
        config = AutoConfig.from_pretrained(tower)
    return str(getattr(config, "vision_config", config).hidden_act)


def tower_preparation(tower: Path, mode: str) -> ImagePreparation:
    """What the tower's own preprocessor_config.json normalises by; made square by `mode` (pad with the mean's colour, stretch, crop)."""
    path = tower / "preprocessor_config.json"
    with os_errors(path):
        raw = path.read_bytes()
    try:
        config: dict[str, Any] = json.loads(raw)
        size = config.get("crop_size") or config["size"]
        side = size if isinstance(size, int) else size.get("height") or size["shortest_edge"]
        mean = config["image_mean"]
        colour = tuple(int(255 * x) for x in mean)
        return ImagePreparation.model_validate(
            {"size_px": side, "mode": mode, "pad_colour": colour, "mean": mean, "std": config["image_std"]}
        )
    except ValidationError as error:
        raise InputError(f"Expected an image preparation, found {error.errors()[0]['msg']}.", "Check --image-mode and the file.") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"Expected size, image_mean and image_std in {path}, found others ({error}).", "Check the file.") from error
