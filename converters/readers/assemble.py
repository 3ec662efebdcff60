"""The last step of every reader: specs of three parts → Checkpoint, with the joints between them checked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from converters.checkpoint import LlmSpec, ProjectorSpec, Tensors, TowerSpec
from edgemed.core.errors import CheckpointError, UnsupportedError
from edgemed.core.images import ImagePreparation
from edgemed.core.manifest import FileRecord

_MLP = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
_LINEAR = {"linear_1.weight", "linear_1.bias"}


@dataclass(frozen=True)
class Options:
    """What a person may choose beside the source; see open_checkpoint."""

    adapter: Path | None = None
    base: Path | None = None
    vision_tower: Path | None = None
    mmproj: Path | None = None
    template: str | None = None
    image_mode: str | None = None
    name: str | None = None
    pre: str | None = None
    image: ImagePreparation | None = None


def build_projector(tensors: Tensors, activation: str, tower: TowerSpec, llm: LlmSpec, where: Path | str) -> ProjectorSpec:
    """One or two linear layers from the tower's width to the LLM's. Raises CheckpointError, UnsupportedError."""
    names = set(tensors)
    if not names:
        raise CheckpointError(
            f"Expected a projector in {where}, found none.", "Check that the checkpoint holds mm_projector or multi_modal_projector."
        )
    if names - _MLP or not (names >= {"linear_1.weight"}):
        raise UnsupportedError(
            f"Expected a projector linear or mlp2x_gelu in {where}, found tensors {', '.join(sorted(names))}.", "Others do not convert."
        )
    linear = not names & {"linear_2.weight", "linear_2.bias"}
    # gelu_new is transformers' other name of the tanh form
    known = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh"}
    if not linear and activation not in known:
        raise UnsupportedError(
            f"Expected a GELU projector in {where}, found '{activation}'.", "llama.cpp's projector has no other activation."
        )
    missing = (_LINEAR if linear else _MLP) - names
    if missing:
        raise UnsupportedError(
            f"Expected a bias in each projector layer of {where}, found no {', '.join(sorted(missing))}.", "Others do not convert."
        )
    middle = llm.hidden if linear else tensors["linear_1.weight"].shape[0]
    shapes = {"linear_1.weight": (middle, tower.hidden), "linear_1.bias": (middle,), "linear_2.weight": (llm.hidden, middle)}
    shapes["linear_2.bias"] = (llm.hidden,)
    for name, tensor in tensors.items():
        if tensor.shape != shapes[name]:
            raise CheckpointError(
                f"Expected shape {list(shapes[name])} for '{tensor.name}' in {where}, found {list(tensor.shape)}.",
                "Check that tower, projector and language model belong together.",
            )
    tanh = known.get(activation) == "gelu_pytorch_tanh"
    return ProjectorSpec("linear" if linear else "mlp2x_gelu", tensors, "gelu_pytorch_tanh" if tanh else "gelu")


def list_files(root: Path, paths: Iterable[Path]) -> dict[str, FileRecord]:
    """Weight files by their path relative to `root` (absolute where they lie elsewhere); hashes are made while converting."""
    folder = (root if root.is_dir() else root.parent).resolve()
    out = {}
    for path in paths:
        full = path.resolve()
        name = full.relative_to(folder) if full.is_relative_to(folder) else full
        out[name.as_posix()] = FileRecord(size_bytes=full.stat().st_size, sha256="")
    return out
