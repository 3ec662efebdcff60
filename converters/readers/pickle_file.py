"""Pickle checkpoints (`.bin`), only as far as they are data: `torch.load(weights_only=True, mmap=True)`.

    tensors = open_pickle(path)

Needs torch (the extra `train`). Anything in the file that would run code is refused by torch, and said so in one sentence.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from converters.checkpoint import F32, TensorSource
from converters.tensors import CallTensor
from edgemed.core.errors import CheckpointError, MissingExtraError
from edgemed.core.files import os_errors


def open_pickle(path: Path) -> dict[str, TensorSource]:
    """Tensors by name, mapped from the file. Raises MissingExtraError without torch, CheckpointError for a damaged or unsafe file."""
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError.of(f"Reading the pickle checkpoint {path}", "train") from error
    with os_errors(path):
        size = path.stat().st_size
        mapped = size > 0 and zipfile.is_zipfile(path)  # files of torch < 1.6 are no archives and cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about the pickle's protocol
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"Expected only tensors in {path}, found a pickle that is damaged or would run code.",
            "Get the checkpoint as safetensors, or from a source you trust.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(
            f"Expected a torch checkpoint in {path}, found a damaged file.", "Copy or download the file again."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"Expected a table of tensors in {path}, found {type(state).__name__}.", "Pass the model's weights.")
    return {str(k): _tensor(str(k), v) for k, v in state.items() if torch.is_tensor(v) and v.is_floating_point()}


def _tensor(name: str, tensor: Any) -> TensorSource:
    def rows(start: int, stop: int) -> F32:
        values: F32 = tensor[start:stop].float().numpy()
        return np.array(values, np.float32)

    kinds = {"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F64"}
    return CallTensor(name, tuple(tensor.shape), rows, kinds.get(str(tensor.dtype), "F32"))
