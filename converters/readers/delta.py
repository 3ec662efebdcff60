"""LLaVA-Med v1.0's deltas (reader e): the difference to a base, added while reading; the projector is stored as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters.checkpoint import TensorSource
from converters.readers.names import Groups, split_names
from converters.readers.store import open_weights
from converters.tensors import DeltaTensor, read_all
from edgemed.core.errors import CheckpointError

# Only these may have more rows than the base has: tokens were added.
_GROWING = {"model.embed_tokens.weight", "lm_head.weight"}
_NORM = "model.norm.weight"
_DELTA_NORM = 0.1


def norm_of_delta(llm: Mapping[str, TensorSource]) -> tuple[float, bool] | None:
    """The mean of the last norm's weights, without signs, and whether they are a delta's: whole ones are near 1, their differences to
    another model's near 0. None where there is no such norm (Phi-2)."""
    norm = llm.get(_NORM)
    if norm is None:
        return None
    mean = float(np.abs(read_all(norm)).mean())
    return mean, mean < _DELTA_NORM


def add_base(delta: Groups, base: Path) -> tuple[Groups, tuple[Path, ...]]:
    """The language model as base + delta; tower and projector are the delta's own. Raises CheckpointError where they do not fit."""
    norm = norm_of_delta(delta.llm)
    if norm is not None and not norm[1]:
        raise CheckpointError(
            f"Expected a delta to add to the base {base}, found whole weights (the last norm's are {norm[0]:.3f} on average).",
            "Leave --base out: it is for adapters and deltas.",
        )
    weights = open_weights(base, "model", "pytorch_model")
    have = split_names(weights.tensors).llm
    out: dict[str, TensorSource] = {}
    for name, tensor in delta.llm.items():
        if name not in have:
            raise CheckpointError(
                f"Expected tensor '{name}' of the delta in its base {base}, found none.", "Check that this is the delta's base."
            )
        out[name] = DeltaTensor(have[name], tensor)
        fits = tensor.shape == have[name].shape
        same_rank = len(tensor.shape) == len(have[name].shape)
        grown = name in _GROWING and same_rank and all(d >= b for d, b in zip(tensor.shape, have[name].shape, strict=True))
        if not fits and not grown:
            raise CheckpointError(
                f"Expected shape {list(tensor.shape)} for '{have[name].name}' of the base {base}, found {list(have[name].shape)}.",
                "Check that this is the delta's base.",
            )
    return Groups(out, delta.tower, delta.projector), weights.files
