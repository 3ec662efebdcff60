"""A whole checkpoint in memory, of random numpy weights: what the writing half of the converters is tested with.

    checkpoint = tiny_checkpoint(tower="clip", hidden=256)

Needs neither torch nor files. Values are rounded to float16, so that an F16 file holds exactly them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from gguf import TokenType

from converters.checkpoint import Checkpoint, LlmSpec, ProjectorSpec, TokenizerSpec, TowerSpec
from converters.llm import llm_slots
from converters.tensors import ArrayTensor
from edgemed.core.conversation import TEMPLATES
from edgemed.core.images import ImagePreparation

TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]


def random_tensor(name: str, shape: tuple[int, ...], seed: int = 0) -> ArrayTensor:
    rng = np.random.default_rng([seed, *name.encode()])
    values = rng.standard_normal(shape) * (np.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.1)
    if "norm" in name and name.endswith("weight"):
        values += 1
    return ArrayTensor(name, values.astype(np.float16).astype(np.float32))


def tiny_llm(
    arch: Any = "llama", layers: int = 2, hidden: int = 64, ffn: int = 128, tied: bool = False, vocab: int = 288, seed: int = 0
) -> LlmSpec:
    spec = LlmSpec(arch, layers, hidden, ffn, 4, 2, hidden // 4, vocab, 512, 1e-5, 10000.0, hidden // 4, {})
    tensors = {
        s.name: random_tensor(s.name, s.shape, seed) for s in llm_slots(spec) if not s.optional or (s.name == "lm_head.weight" and not tied)
    }
    return LlmSpec(**{**spec.__dict__, "tensors": tensors})


def tower_shapes(kind: str, layers: int, hidden: int, ffn: int, image: int, patch: int) -> dict[str, tuple[int, ...]]:
    clip = kind == "clip"
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.position_embedding.weight": ((image // patch) ** 2 + clip, hidden),
        "post_layernorm.weight": (hidden,),
        "post_layernorm.bias": (hidden,),
    }
    if clip:
        shapes |= {"embeddings.class_embedding": (hidden,), "pre_layrnorm.weight": (hidden,), "pre_layrnorm.bias": (hidden,)}
    else:
        shapes["embeddings.patch_embedding.bias"] = (hidden,)
    for i in range(layers):
        for name, rows, columns in (
            ("mlp.fc1", ffn, hidden),
            ("mlp.fc2", hidden, ffn),
            *((f"self_attn.{p}_proj", hidden, hidden) for p in ("q", "k", "v", "out")),
        ):
            shapes |= {f"encoder.layers.{i}.{name}.weight": (rows, columns), f"encoder.layers.{i}.{name}.bias": (rows,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{i}.{norm}.{part}": (hidden,) for part in ("weight", "bias")}
    return shapes


def tiny_tower(
    kind: Any = "siglip", activation: Any = None, stored_layers: int = 3, layers: int = 2, ffn: int = 60, **more: Any
) -> TowerSpec:
    tensors = {n: random_tensor(n, s) for n, s in tower_shapes(kind, stored_layers, 32, ffn, 48, 8).items()}
    activation = activation or {"clip": "quick_gelu", "siglip": "gelu_pytorch_tanh"}[kind]
    return TowerSpec(kind, layers, 32, ffn, 4, 48, 8, 1e-5, activation, tensors, **more)


def tiny_projector(kind: Any = "mlp2x_gelu", hidden: int = 64) -> ProjectorSpec:
    shapes: dict[str, tuple[int, ...]] = {"linear_1.weight": (hidden, 32), "linear_1.bias": (hidden,)}
    if kind == "mlp2x_gelu":
        shapes |= {"linear_2.weight": (hidden, hidden), "linear_2.bias": (hidden,)}
    return ProjectorSpec(kind, {n: random_tensor(n, s) for n, s in shapes.items()})


def tiny_tokenizer(rows: int = 288) -> TokenizerSpec:
    tokens = [*TOKENS, *(f"[PAD{i}]" for i in range(rows - len(TOKENS)))]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * 27]
    types = [int(k) for k in [*kinds, *[TokenType.UNUSED] * (rows - len(kinds))]]
    return TokenizerSpec("llama", "default", tokens, types, [-float(i) for i in range(rows)], None, 1, 2, 0, None, True, True, "each")


def tiny_checkpoint(
    tower: Any = "siglip", projector: Any = "mlp2x_gelu", llm: LlmSpec | None = None, name: str = "tiny model", **choices: Any
) -> Checkpoint:
    llm = llm or tiny_llm()
    return Checkpoint(
        reader="memory",
        path=Path("/nowhere"),
        name=name,
        llm=llm,
        tower=tiny_tower(tower, **choices),
        projector=tiny_projector(projector, llm.hidden),
        tokenizer=tiny_tokenizer(llm.vocab_size),
        image=ImagePreparation(size_px=48, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        template=TEMPLATES["v1"],
    )
