"""What transformers makes of the probe, from a checkpoint in HF's layout: the outside witness of `edgemed verify --reference`.

Float32 on the CPU, one image, one prompt. Needs the `train` extra. Other layouts are compared in the tests, on random models.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgemed.core.contract import checkpoint_errors, require_llava
from edgemed.core.errors import CheckpointError, MissingExtraError
from edgemed.core.images import ImagePreparation, normalise

F32 = NDArray[np.float32]


def measure_reference(folder: Path, pixels: NDArray[np.uint8], image: ImagePreparation, ids: Sequence[int | None]) -> tuple[F32, F32]:
    """(rows of the image [image_tokens, width], logits [positions, vocab]) by transformers; None in `ids` is the image.

    Raises CheckpointError, UnsupportedError (another layout), MissingExtraError.
    """
    _check(folder)
    import torch
    from transformers import LlavaForConditionalGeneration

    with checkpoint_errors(folder):
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    most, vocab = max(i for i in ids if i is not None), model.get_input_embeddings().weight.shape[0]
    if most >= vocab:
        raise CheckpointError(
            f"Expected the checkpoint that was converted in {folder}, found one with {vocab} tokens for the token {most}.",
            "Check the path.",
        )
    values = torch.from_numpy(normalise(pixels, image)[None])
    with torch.no_grad():
        features = model.get_image_features(pixel_values=values)
        rows = getattr(features, "pooler_output", features)[0]
        marker = model.config.image_token_id
        tokens = [t for i in ids for t in ([marker] * rows.shape[0] if i is None else [i])]
        logits = model(input_ids=torch.tensor([tokens]), pixel_values=values).logits[0]
    return rows.numpy().astype(np.float32), logits.numpy().astype(np.float32)


def _check(folder: Path) -> None:
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        raise MissingExtraError.of("Comparing with transformers", "train")
    require_llava(folder)
