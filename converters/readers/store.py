"""A folder's weights, whatever containers they are in: one file or shards with an index, safetensors or pickle.

    weights = open_weights(folder, "model", "pytorch_model")
    weights.tensors["lm_head.weight"].shape, weights.files

Knows no names of layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.checkpoint import TensorSource
from converters.readers.pickle_file import open_pickle
from converters.readers.safetensors_file import open_safetensors
from edgemed.core.errors import CheckpointError
from edgemed.core.files import os_errors


@dataclass(frozen=True)
class Weights:
    """Tensors under the names they have on disk, and the files they came from."""

    tensors: Mapping[str, TensorSource] = field(default_factory=dict)
    files: tuple[Path, ...] = ()

    def __or__(self, other: Weights) -> Weights:
        return Weights({**self.tensors, **other.tensors}, (*self.files, *other.files))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where it is missing or something else."""
    if not path.is_file():
        raise CheckpointError(f"Expected {path.name} in {path.parent}, found no such file.", "Check that the checkpoint is complete.")
    with os_errors(path):
        raw = path.read_bytes()
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"Expected JSON in {path}, found something else ({error}).", "Copy or download the file again.") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"Expected a JSON object in {path}, found {type(data).__name__}.", "Copy or download the file again.")
    return data


def find_weights(folder: Path, *stems: str) -> Weights | None:
    """The first of the stems that is there, safetensors before pickle; None where there is none."""
    for suffix in ("safetensors", "bin"):
        for stem in stems:
            index, single = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
            if index.is_file():
                return _open_shards(folder, index)
            if single.is_file():
                return open_file(single)
    return None


def open_weights(folder: Path, *stems: str) -> Weights:
    """As find_weights. Raises CheckpointError where no weights are found."""
    weights = find_weights(folder, *stems)
    if weights is None:
        names = " or ".join(f"{stem}.safetensors" for stem in stems)
        raise CheckpointError(
            f"Expected {names} (or shards with an index) in {folder}, found none.", "Check that the checkpoint is complete."
        )
    return weights


def open_file(path: Path) -> Weights:
    """One container, by its suffix."""
    return Weights(open_safetensors(path) if path.suffix == ".safetensors" else open_pickle(path), (path,))


def _open_shards(folder: Path, index: Path) -> Weights:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) and Path(v).name == v for v in names.values()):
        raise CheckpointError(f"Expected a weight_map of plain file names in {index}, found none.", "Copy or download the file again.")
    out: dict[str, TensorSource] = {}
    paths = [folder / name for name in sorted(set(names.values()))]
    for path in paths:
        if not path.is_file():
            raise CheckpointError(
                f"Expected the shard {path.name} named by {index.name} in {folder}, found none.", "Download the missing shard."
            )
    shards = {path.name: open_file(path).tensors for path in paths}
    for name, shard in names.items():
        if name in shards[shard]:
            out[name] = shards[shard][name]
        elif not _is_buffer(name):
            raise CheckpointError(f"Expected tensor '{name}' in {folder / shard}, found none.", "Download that shard again.")
    return Weights(out, tuple(paths))


def _is_buffer(name: str) -> bool:
    # integer buffers are left out of what the containers list
    return name.endswith("position_ids")
