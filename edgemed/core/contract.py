"""edgemed.json beside a checkpoint: how its images were prepared and its turns written in training.

Fine-tuning writes it, the converter and the transformers reference read it; checkpoints of others have none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from edgemed.core.conversation import ConversationTemplate
from edgemed.core.errors import CheckpointError, EdgemedError, UnsupportedError
from edgemed.core.files import os_errors, save_text
from edgemed.core.images import ImagePreparation
from edgemed.core.model import Frozen

CONTRACT_NAME = "edgemed.json"
ARCHITECTURE = "LlavaForConditionalGeneration"


class Contract(Frozen):
    """What training and inference must do alike."""

    image: ImagePreparation
    template: ConversationTemplate
    # The language model learnt with the rounding errors of 4 bits, of just the types that edgemed/finetune/rounding.py names.
    rounded: bool = False


def count_image_tokens(image_size: int, patch_size: int, tower: str, strategy: str) -> int:
    """Rows of one image in HF's `LlavaForConditionalGeneration`, from a tower's config: its `model_type` and the select strategy."""
    has_cls = "clip" in tower and "siglip" not in tower
    # HF's "default" strategy leaves token 0 out: CLS of a CLIP tower, but the first patch of a SigLIP one.
    return (image_size // patch_size) ** 2 + has_cls - (strategy == "default")


def require_llava(folder: Path) -> None:
    """A folder whose config.json names HF's LLaVA: transformers makes a random 7 B model of any other without a word.

    Raises CheckpointError where there is none, UnsupportedError for another architecture.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"Expected a checkpoint with a config.json at {folder}, found none.", "Check the path.")
    with os_errors(path):
        raw = path.read_bytes()
    try:
        found = json.loads(raw).get("architectures")
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"Expected a JSON object in {path}, found something else.", "Copy the checkpoint again.") from error
    if found != [ARCHITECTURE]:
        name = ", ".join(map(str, found)) if isinstance(found, list) else found
        raise UnsupportedError(
            f"Expected {ARCHITECTURE} in {path}, found {name}.",
            f"Of a LLaVA model in another layout make one with edgemed convert {folder} --to hf, of a bare language model with "
            "edgemed finetune new.",
        )


@contextmanager
def checkpoint_errors(folder: Path) -> Iterator[None]:
    """What transformers and safetensors say of a folder that they cannot load, as a CheckpointError: they have no common base for it."""
    try:
        yield
    except (MemoryError, EdgemedError):
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"Expected a checkpoint that transformers loads at {folder}, found another ({said}).", "Check it.") from error


def load_contract(folder: Path) -> Contract | None:
    """The folder's contract, or None where it has none. Raises CheckpointError."""
    path = folder / CONTRACT_NAME
    if not path.is_file():
        return None
    with os_errors(path):
        raw = path.read_bytes()
    try:
        return Contract.model_validate_json(raw)
    except ValidationError as error:
        raise CheckpointError(
            f"Expected image preparation and template in {path}, found {error.errors()[0]['msg']}.", "Train again."
        ) from error


def save_contract(folder: Path, contract: Contract) -> None:
    """Write edgemed.json, whole or not at all."""
    save_text(folder / CONTRACT_NAME, contract.model_dump_json(indent=1) + "\n")


def save_processor(folder: Path, image: ImagePreparation) -> None:
    """preprocessor_config.json, as near as HF's own processors come to it (they know no padding to a square)."""
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": image.size_px, "width": image.size_px},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
        "do_convert_rgb": True,
    }
    save_text(folder / "preprocessor_config.json", json.dumps(processor, indent=1))
