"""What a reader hands to the writer: a checkpoint as specs and lazily read tensors, whatever layout it came from.

Names inside are canonical: the LLM's as in a bare HF causal model (`model.layers.0.self_attn.q_proj.weight`, `lm_head.weight`),
the tower's as in a bare HF vision model (`encoder.layers.0.mlp.fc1.weight`, `embeddings.patch_embedding.weight`), the projector's
`linear_1.*`, `linear_2.*`. Rows of q and k are in HF's order. Nothing here reads a file or knows GGUF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgemed.core.conversation import ConversationTemplate
from edgemed.core.images import ImagePreparation
from edgemed.core.manifest import FileRecord

F32 = NDArray[np.float32]


class TensorSource(Protocol):
    """A tensor that is read in pieces, so that no model is ever whole in memory. Safe to read from several threads."""

    @property
    def name(self) -> str:
        """Its name in the source, with what was applied to it, for the manifest: 'a.weight + lora(b)'."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in numpy order."""

    def read(self, start: int, stop: int) -> F32:
        """float32 rows start:stop of the first axis, other axes whole. A one-dimensional tensor's rows are its elements."""


Tensors = Mapping[str, TensorSource]


@dataclass(frozen=True)
class LlmSpec:
    """A language model. `arch` is llama.cpp's name of it."""

    arch: Literal["llama", "qwen2", "phi2", "stablelm"]
    layers: int
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    norm_eps: float
    rope_theta: float
    rope_dims: int
    tensors: Tensors
    # Factor of linear rope scaling; other kinds are refused by the reader.
    rope_linear_factor: float | None = None
    parallel_residual: bool = False


@dataclass(frozen=True)
class TowerSpec:
    """A vision tower. `layers` is how many encoder layers run to reach the feature; `tensors` may hold more."""

    kind: Literal["clip", "siglip"]
    layers: int
    hidden: int
    ffn: int
    heads: int
    image_size_px: int
    patch_size_px: int
    norm_eps: float
    activation: Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
    tensors: Tensors
    # Only these two: see VisionRecord in core/manifest.py.
    skip_first_token: bool = False
    keep_cls: bool = False

    @property
    def patches(self) -> int:
        return (self.image_size_px // self.patch_size_px) ** 2

    @property
    def image_tokens(self) -> int:
        return self.patches + self.keep_cls - self.skip_first_token


@dataclass(frozen=True)
class ProjectorSpec:
    """`linear` (linear_1 alone) or `mlp2x_gelu`. `activation` is the source's own: exact or tanh GELU."""

    kind: Literal["linear", "mlp2x_gelu"]
    tensors: Tensors
    activation: Literal["gelu", "gelu_pytorch_tanh"] = "gelu"


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as GGUF keeps it. `types` are gguf.TokenType values; lists have the embedding's row count."""

    model: Literal["llama", "gpt2"]
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    pad_id: int | None
    add_bos: bool
    # What llama.cpp's own tokenisation does (for foreign programs); ours follows `space_prefix`, see core/manifest.py.
    add_space_prefix: bool
    space_prefix: Literal["none", "first", "chunk", "each"]
    # Further end-of-turn id (chatml's <|im_end|>), where it is not the eos.
    eot_id: int | None = None


@dataclass(frozen=True)
class Checkpoint:
    """Everything a conversion needs."""

    reader: str
    path: Path
    name: str
    llm: LlmSpec
    tower: TowerSpec
    projector: ProjectorSpec
    tokenizer: TokenizerSpec
    image: ImagePreparation
    template: ConversationTemplate
    # See core/contract.py: at 4 bits such a model gets the types that it learnt with.
    rounded: bool = False
    # Weight files with size and hash; hashes are made while converting, see convert.py.
    files: dict[str, FileRecord] = field(default_factory=dict)
    # Sentences a person should read (an approximation, a choice the layout left open); shown as warnings, kept in the manifest.
    notes: tuple[str, ...] = ()
