"""A tower and projector as libmtmd's `mlp` graph wants them: metadata, tensor names, and rewritings that change no value.

    metadata = vision_metadata(tower, image, width=2048, stored_ffn=4352)
    tensors = vision_tensors(tower, projector, width=2048, stored_ffn=4352)     # [(GGUF name, TensorSource)]

Three rewritings fit a model into that graph (llama-cpp-facts.md, sections 1 and 11): only the encoder layers that the feature needs
are stored, with `feature_layer` naming the last; the feed-forward may be zero-padded so that its rows fill quantisation blocks
(gelu(0) = 0); a one-layer projector becomes two, because gelu(x) − gelu(−x) = x. Behaviour there follows from which tensors exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from converters.checkpoint import F32, ProjectorSpec, Tensors, TensorSource, TowerSpec
from converters.metadata import Metadata, boolean, f32, f32s, i32s, text, u32
from edgemed.core.errors import CheckpointError, UnsupportedError
from edgemed.core.images import ImagePreparation

# Encoder layer: name in the source → name in GGUF.
LAYER_NAMES = {
    "layer_norm1": "ln1",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


@dataclass(frozen=True)
class PaddedTensor:
    """`base` with zeros after its rows, up to `shape`; a matrix also after its columns."""

    base: TensorSource
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.base.name} + zeros"

    def read(self, start: int, stop: int) -> F32:
        out = np.zeros((stop - start, *self.shape[1:]), np.float32)
        last = min(stop, self.base.shape[0])
        if last > start:
            out[(slice(0, last - start), *(slice(0, n) for n in self.base.shape[1:]))] = self.base.read(start, last)
        return out


@dataclass(frozen=True)
class MirroredTensor:
    """[W; −W]: `base`, and below it its negative."""

    base: TensorSource

    @property
    def name(self) -> str:
        return f"[{self.base.name}; -{self.base.name}]"

    @property
    def shape(self) -> tuple[int, ...]:
        return (2 * self.base.shape[0], *self.base.shape[1:])

    def read(self, start: int, stop: int) -> F32:
        rows = self.base.shape[0]
        parts = []
        if start < rows:
            parts.append(self.base.read(start, min(stop, rows)))
        if stop > rows:
            parts.append(-self.base.read(max(start - rows, 0), stop - rows))
        return np.concatenate(parts)


@dataclass(frozen=True)
class DifferenceTensor:
    """[I, −I] of `width` rows: what undoes a mirrored projector after GELU."""

    width: int
    name: str = "[I, -I]"

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.width, 2 * self.width)

    def read(self, start: int, stop: int) -> F32:
        out = np.zeros((stop - start, 2 * self.width), np.float32)
        rows = np.arange(start, stop)
        out[rows - start, rows] = 1
        out[rows - start, rows + self.width] = -1
        return out


@dataclass(frozen=True)
class ZeroTensor:
    """A bias that is not there."""

    shape: tuple[int, ...]
    name: str = "zeros"

    def read(self, start: int, stop: int) -> F32:
        return np.zeros((stop - start, *self.shape[1:]), np.float32)


def vision_metadata(tower: TowerSpec, image: ImagePreparation, *, width: int, stored_ffn: int) -> Metadata:
    """The mmproj's keys (clip.cpp:1221-1425). `width` is the LLM's. Raises UnsupportedError, CheckpointError."""
    if image.size_px != tower.image_size_px:
        raise CheckpointError(
            f"Expected images prepared at the tower's {tower.image_size_px} px, found {image.size_px} px.",
            "Check preprocessor_config.json.",
        )
    prefix = "clip.vision"
    metadata: Metadata = {
        "general.type": text("mmproj"),
        "clip.has_vision_encoder": boolean(True),
        "clip.projector_type": text("mlp"),
        f"{prefix}.image_size": u32(tower.image_size_px),
        f"{prefix}.patch_size": u32(tower.patch_size_px),
        f"{prefix}.embedding_length": u32(tower.hidden),
        f"{prefix}.feed_forward_length": u32(stored_ffn),
        f"{prefix}.block_count": u32(tower.layers),
        # Without it libmtmd leaves out the last layer that is stored.
        f"{prefix}.feature_layer": i32s([tower.layers]),
        f"{prefix}.projection_dim": u32(width),
        f"{prefix}.attention.head_count": u32(tower.heads),
        f"{prefix}.attention.layer_norm_epsilon": f32(tower.norm_eps),
        f"{prefix}.image_mean": f32s(image.mean),
        f"{prefix}.image_std": f32s(image.std),
    }
    if tower.activation != "quick_gelu":  # neither use_gelu nor use_silu is quick_gelu; use_gelu is the tanh form
        metadata["clip.use_gelu"] = boolean(True)
    return metadata


def vision_tensors(tower: TowerSpec, projector: ProjectorSpec, *, width: int, stored_ffn: int) -> list[tuple[str, TensorSource]]:
    """Every tensor of the mmproj in file order. Raises CheckpointError where one is missing or of another shape."""
    if tower.layers < 1 or tower.image_size_px // tower.patch_size_px < 1:
        raise UnsupportedError(
            f"Expected a tower of at least one layer and one patch, found {tower.layers} layers.", "Check the checkpoint's config.json."
        )
    return [*_embeddings(tower), *_layers(tower, stored_ffn), *_projector(projector, tower.hidden, width)]


def _embeddings(tower: TowerSpec) -> Iterator[tuple[str, TensorSource]]:
    d, p, rows = tower.hidden, tower.patch_size_px, tower.patches + (tower.kind == "clip")
    yield "v.patch_embd.weight", take(tower.tensors, "embeddings.patch_embedding.weight", (d, 3, p, p))
    if tower.kind == "siglip":
        yield "v.patch_embd.bias", take(tower.tensors, "embeddings.patch_embedding.bias", (d,))
    else:
        yield "v.class_embd", take(tower.tensors, "embeddings.class_embedding", (d,))
        for part in ("weight", "bias"):
            yield f"v.pre_ln.{part}", take(tower.tensors, f"pre_layrnorm.{part}", (d,))  # the spelling is the source's
    yield "v.position_embd.weight", take(tower.tensors, "embeddings.position_embedding.weight", (rows, d))


def _layers(tower: TowerSpec, stored_ffn: int) -> Iterator[tuple[str, TensorSource]]:
    d, ffn = tower.hidden, tower.ffn
    shapes = {"mlp.fc1": (ffn, d), "mlp.fc2": (d, ffn), "layer_norm1": (d,), "layer_norm2": (d,)}
    stored = {"mlp.fc1": (stored_ffn, d), "mlp.fc2": (d, stored_ffn)}
    for i in range(tower.layers):
        for source, name in LAYER_NAMES.items():
            shape = shapes.get(source, (d, d))
            weight = take(tower.tensors, f"encoder.layers.{i}.{source}.weight", shape)
            bias = take(tower.tensors, f"encoder.layers.{i}.{source}.bias", shape[:1])
            target = stored.get(source, shape)
            yield f"v.blk.{i}.{name}.weight", weight if target == shape else PaddedTensor(weight, target)
            yield f"v.blk.{i}.{name}.bias", bias if target[0] == shape[0] else PaddedTensor(bias, target[:1])


def _projector(projector: ProjectorSpec, hidden: int, width: int) -> Iterator[tuple[str, TensorSource]]:
    first = take(projector.tensors, "linear_1.weight", (width, hidden))
    first_bias = take(projector.tensors, "linear_1.bias", (width,), optional=True)
    if projector.kind == "linear":
        yield "mm.0.weight", MirroredTensor(first)
        yield "mm.0.bias", MirroredTensor(first_bias)
        yield "mm.2.weight", DifferenceTensor(width)
        yield "mm.2.bias", ZeroTensor((width,))
        return
    yield "mm.0.weight", first
    yield "mm.0.bias", first_bias
    yield "mm.2.weight", take(projector.tensors, "linear_2.weight", (width, width))
    yield "mm.2.bias", take(projector.tensors, "linear_2.bias", (width,), optional=True)


def source_names(layers: int) -> dict[str, str]:
    """GGUF name → canonical name, for a tower of so many layers and a two-layer projector."""
    out = {
        "v.patch_embd.weight": "embeddings.patch_embedding.weight",
        "v.patch_embd.bias": "embeddings.patch_embedding.bias",
        "v.class_embd": "embeddings.class_embedding",
        "v.position_embd.weight": "embeddings.position_embedding.weight",
    }
    pairs = {"v.pre_ln": "pre_layrnorm", "mm.0": "linear_1", "mm.2": "linear_2"}
    pairs |= {f"v.blk.{i}.{name}": f"encoder.layers.{i}.{source}" for i in range(layers) for source, name in LAYER_NAMES.items()}
    return out | {f"{name}.{part}": f"{source}.{part}" for name, source in pairs.items() for part in ("weight", "bias")}


def take(tensors: Tensors, name: str, shape: tuple[int, ...], optional: bool = False) -> TensorSource:
    """The tensor called `name`, of that shape; zeros where it is `optional` and missing. Raises CheckpointError."""
    source = tensors.get(name)
    if source is None:
        if optional:
            return ZeroTensor(shape)
        raise CheckpointError(f"Expected a tensor '{name}' of shape {shape}, found none.", "Check that the checkpoint is complete.")
    if tuple(source.shape) != shape:
        raise CheckpointError(
            f"Expected shape {shape} for '{source.name}', found {tuple(source.shape)}.", "Check that config.json belongs to these weights."
        )
    return source
