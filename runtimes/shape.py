"""What a plan needs to know of a GGUF pair, from its headers alone: sizes, layers, heads, and every tensor's type and place in the file.

    shape = read_shape(artifact, tensor_bytes)     # raises ArtifactError

No tensor data is read. Shapes are in ggml's order.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from edgemed.core.errors import ArtifactError
from edgemed.core.manifest import Artifact
from runtimes.gguf_header import ArrayLength, Header, TensorInfo, read_header

TensorBytes = Callable[[int, tuple[int, ...]], int | None]

# Head sizes for which llama.cpp's CUDA backend computes attention on tensor cores (fattn.cu). A tower with others, such as SigLIP
# so400m with 72, is slower there with flash attention than without (docs/LOG.md, 2026-11-22). On a CPU it is faster with any.
FAST_HEADS = frozenset({64, 80, 96, 112, 128, 256})

_UNPACKED_TYPES = frozenset({8, 12, 14})  # Q8_0, Q4_K, Q6_K
_BLOCK = re.compile(r"blk\.(\d+)\.")


@dataclass(frozen=True)
class LlmShape:
    """A language model's dimensions. `context_length` is what it was trained on."""

    arch: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    context_length: int
    # Entries of the tokenizer's table of merges; none in SentencePiece.
    merges: int
    tensors: dict[str, TensorInfo]

    @property
    def kv_width(self) -> int:
        """Values of K, and of V, for one token in one layer."""
        return self.head_dim * self.kv_heads

    @property
    def tied(self) -> bool:
        """Whether the output layer is the token embedding."""
        return "output.weight" not in self.tensors

    @cached_property
    def weight_bytes(self) -> int:
        """All tensors as they lie in the file."""
        return sum(t.size_bytes for t in self.tensors.values())

    def layer_of(self, name: str) -> int | None:
        """A repeating layer's number; None for the rest."""
        match = _BLOCK.match(name)
        return int(match[1]) if match else None


@dataclass(frozen=True)
class TowerShape:
    """A vision tower's dimensions. `rows` is the graph's tokens (patches, and CLS), `layers` those that are run."""

    size_px: int
    patch_px: int
    width: int
    heads: int
    layers: int
    out_width: int
    has_cls: bool
    tensors: dict[str, TensorInfo]

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patches(self) -> int:
        return (self.size_px // self.patch_px) ** 2

    @property
    def rows(self) -> int:
        return self.patches + self.has_cls

    @cached_property
    def weight_bytes(self) -> int:
        return sum(t.size_bytes for t in self.tensors.values())


@dataclass(frozen=True)
class PairShape:
    """Both files. `image_tokens` is what one image takes of a context."""

    name: str
    llm: LlmShape
    tower: TowerShape
    image_tokens: int
    # The tower's type by the manifest. One of 16 bits is computed more exactly than in BF16 (libmtmd.py).
    tower_quant: str = ""

    @cached_property
    def suits_dense_prompts(self) -> bool:
        """Whether dense prompts gain (the layers' matrices are all of types that cuda/prompts.cu unpacks) and the tower loses nothing."""
        layers = {t.type for name, t in self.llm.tensors.items() if self.llm.layer_of(name) is not None and len(t.shape) == 2}
        return layers <= _UNPACKED_TYPES and self.tower_quant not in ("F16", "BF16")


def tower_flash_attention(wanted: Literal["auto", "on", "off"], head_dim: int, on_gpu: bool) -> bool:
    """Whether a tower with heads of this size is computed with flash attention; "auto" takes the faster way."""
    return wanted == "on" or (wanted == "auto" and (not on_gpu or head_dim in FAST_HEADS))


def read_tower(path: Path, tensor_bytes: TensorBytes) -> TowerShape:
    """The tower's header alone. Raises ArtifactError."""
    return _tower_shape(read_header(path, tensor_bytes))


def read_shape(artifact: Artifact, tensor_bytes: TensorBytes) -> PairShape:
    """Read both headers. Raises ArtifactError."""
    llm = read_header(artifact.llm_path, tensor_bytes)
    tower = read_tower(artifact.mmproj_path, tensor_bytes)
    vision = artifact.manifest.vision
    return PairShape(artifact.manifest.name, _llm_shape(llm), tower, vision.image_tokens, vision.quant)


def _number(header: Header, key: str, default: int | None = None) -> int:
    value = header.values.get(key, default)
    if not isinstance(value, int) or value <= 0:
        raise ArtifactError(
            f"Expected {key} to be a positive number in {header.path.name}, found {'none' if value is None else value}.",
            "Convert the model again.",
        )
    return value


def _length(value: object) -> int:
    return value.length if isinstance(value, ArrayLength) else len(value) if isinstance(value, list) else 0


def _llm_shape(header: Header) -> LlmShape:
    arch = str(header.values.get("general.architecture"))
    heads, width = _number(header, f"{arch}.attention.head_count"), _number(header, f"{arch}.embedding_length")
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ArtifactError(f"Expected a tensor token_embd.weight in {header.path.name}, found none.", "Convert the model again.")
    return LlmShape(
        arch=arch,
        layers=_number(header, f"{arch}.block_count"),
        width=width,
        heads=heads,
        kv_heads=_number(header, f"{arch}.attention.head_count_kv", heads),
        head_dim=_number(header, f"{arch}.attention.key_length", width // heads),
        ffn=_number(header, f"{arch}.feed_forward_length"),
        vocab=embedding.shape[1],
        merges=_length(header.values.get("tokenizer.ggml.merges")),
        context_length=_number(header, f"{arch}.context_length"),
        tensors=header.tensors,
    )


def _tower_shape(header: Header) -> TowerShape:
    blocks = _number(header, "clip.vision.block_count")
    features = header.values.get("clip.vision.feature_layer")
    # llava.cpp: up to the deepest feature layer, or else all layers but the last.
    layers = max((v for v in features if isinstance(v, int)), default=blocks - 1) if isinstance(features, list) else blocks - 1
    return TowerShape(
        size_px=_number(header, "clip.vision.image_size"),
        patch_px=_number(header, "clip.vision.patch_size"),
        width=_number(header, "clip.vision.embedding_length"),
        heads=_number(header, "clip.vision.attention.head_count"),
        layers=layers,
        out_width=_number(header, "clip.vision.projection_dim"),
        has_cls="v.class_embd" in header.tensors,
        tensors=header.tensors,
    )
