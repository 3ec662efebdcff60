"""Language models in GGUF: which tensors each architecture has, under which names, and its metadata.

    llm_metadata(spec, "edgemed-demo")     # {"general.architecture": …, "llama.block_count": …}
    llm_tensors(spec)                      # [("token_embd.weight", source), …] in the file's order
    check_llm(spec, where)                 # every tensor there, none unknown, all shapes right; raises CheckpointError

Rows of q and k are put into llama.cpp's rotary order for `llama` (lazily). Knows no files and no quantisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from gguf import Keys

from converters.checkpoint import LlmSpec, Tensors, TensorSource
from converters.metadata import Metadata, boolean, f32, text, u32
from converters.tensors import RopeRows
from edgemed.core.errors import CheckpointError


@dataclass(frozen=True)
class Slot:
    """One tensor of an architecture: canonical name, GGUF name, shape, and whether a checkpoint may lack it."""

    name: str
    gguf: str
    shape: tuple[int, ...]
    optional: bool = False
    # Head size, where rows follow rotary pairs.
    rope_head_dim: int | None = None


@dataclass(frozen=True)
class _Family:
    """What tells the architectures apart. Biases are by linear layer; "optional" ones follow the checkpoint."""

    norm: str
    final_norm: str
    attn_output: str
    ffn: tuple[tuple[str, str], ...]
    norm_bias: bool
    bias: frozenset[str]
    optional_bias: frozenset[str]
    second_norm: bool = True
    permuted: bool = False
    untied: bool = False


_GATED = (("gate_proj", "ffn_gate"), ("up_proj", "ffn_up"), ("down_proj", "ffn_down"))
_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
_FAMILIES: dict[str, _Family] = {
    "llama": _Family("rms", "norm", "o_proj", _GATED, False, frozenset(), _QKV | {"o_proj"}, permuted=True),
    "qwen2": _Family("rms", "norm", "o_proj", _GATED, False, _QKV, frozenset()),
    "phi2": _Family(
        "layer", "final_layernorm", "dense", (("fc1", "ffn_up"), ("fc2", "ffn_down")), True,
        _QKV | {"dense", "fc1", "fc2", "lm_head"}, frozenset(), second_norm=False, untied=True,
    ),
    "stablelm": _Family("layer", "norm", "o_proj", _GATED, True, frozenset(), _QKV, untied=True),
}  # fmt: skip


def _linear(family: _Family, name: str, gguf: str, rows: int, columns: int, **more: int | None) -> Iterator[Slot]:
    head_dim = more.get("rope_head_dim") if family.permuted else None
    leaf = name.rsplit(".", 1)[-1]
    yield Slot(f"{name}.weight", f"{gguf}.weight", (rows, columns), False, head_dim)
    if leaf in family.bias | family.optional_bias:
        yield Slot(f"{name}.bias", f"{gguf}.bias", (rows,), leaf in family.optional_bias, head_dim)


def _norm(family: _Family, name: str, gguf: str, width: int, optional: bool = False) -> Iterator[Slot]:
    yield Slot(f"{name}.weight", f"{gguf}.weight", (width,), optional)
    if family.norm_bias:
        yield Slot(f"{name}.bias", f"{gguf}.bias", (width,), optional)


def llm_slots(spec: LlmSpec) -> Iterator[Slot]:
    """Every tensor that a model of this architecture has, in the order in which it is written."""
    family, h, d = _FAMILIES[spec.arch], spec.hidden, spec.head_dim
    yield Slot("model.embed_tokens.weight", "token_embd.weight", (spec.vocab_size, h))
    for i in range(spec.layers):
        layer, block = f"model.layers.{i}", f"blk.{i}"
        yield from _norm(family, f"{layer}.input_layernorm", f"{block}.attn_norm", h)
        yield from _linear(family, f"{layer}.self_attn.q_proj", f"{block}.attn_q", spec.heads * d, h, rope_head_dim=d)
        yield from _linear(family, f"{layer}.self_attn.k_proj", f"{block}.attn_k", spec.kv_heads * d, h, rope_head_dim=d)
        yield from _linear(family, f"{layer}.self_attn.v_proj", f"{block}.attn_v", spec.kv_heads * d, h)
        yield from _linear(family, f"{layer}.self_attn.{family.attn_output}", f"{block}.attn_output", h, spec.heads * d)
        if family.second_norm:  # StableLM's parallel residual has none, and llama.cpp tells by the tensor's absence
            yield from _norm(family, f"{layer}.post_attention_layernorm", f"{block}.ffn_norm", h, spec.parallel_residual)
        for name, gguf in family.ffn:
            shape = (h, spec.ffn) if gguf == "ffn_down" else (spec.ffn, h)
            yield from _linear(family, f"{layer}.mlp.{name}", f"{block}.{gguf}", *shape)
    yield from _norm(family, f"model.{family.final_norm}", "output_norm", h)
    for slot in _linear(family, "lm_head", "output", spec.vocab_size, h):
        yield slot if family.untied else replace(slot, optional=True)


def check_llm(spec: LlmSpec, where: Path | str) -> None:
    """Raises CheckpointError for the first tensor that is missing, unknown or of another shape than the configuration says."""
    check_layer_count(spec.layers, len(spec.tensors), where)
    slots = {slot.name: slot for slot in llm_slots(_untied(spec))}
    check_tensors(spec.tensors, slots, where)


def check_layer_count(layers: int, tensors: int, where: Path | str) -> None:
    """Raises CheckpointError for more layers than there are tensors, before anything is listed by layer."""
    if layers > tensors:
        raise CheckpointError(f"Expected tensors of {layers} layers in {where}, found {tensors} tensors.", "Check config.json.")


def check_tensors(tensors: Tensors, slots: dict[str, Slot], where: Path | str) -> None:
    """Compare tensors with what an architecture has. Raises CheckpointError."""
    for name, tensor in tensors.items():
        if name not in slots:
            raise CheckpointError(f"Expected no tensor '{name}' in {where}, found one.", "Check that config.json belongs to these weights.")
        if tensor.shape != slots[name].shape:
            raise CheckpointError(
                f"Expected shape {list(slots[name].shape)} for '{tensor.name}' in {where}, found {list(tensor.shape)}.",
                "Check that config.json belongs to these weights.",
            )
    for name, slot in slots.items():
        if name not in tensors and not slot.optional:
            raise CheckpointError(f"Expected tensor '{name}' in {where}, found none.", "Check that the checkpoint is complete.")


def _untied(spec: LlmSpec) -> LlmSpec:
    """With the output matrix spelled out where llama.cpp asks for one and the checkpoint ties it to the embedding."""
    if not _FAMILIES[spec.arch].untied or "lm_head.weight" in spec.tensors or "model.embed_tokens.weight" not in spec.tensors:
        return spec
    return replace(spec, tensors={**spec.tensors, "lm_head.weight": spec.tensors["model.embed_tokens.weight"]})


def llm_tensors(spec: LlmSpec) -> list[tuple[str, TensorSource]]:
    """GGUF name and source of every tensor, in the order of the layers; q and k rows in llama.cpp's order."""
    spec = _untied(spec)
    out: list[tuple[str, TensorSource]] = []
    for slot in llm_slots(spec):
        source = spec.tensors.get(slot.name)
        if source is not None:
            out.append((slot.gguf, RopeRows(source, slot.rope_head_dim) if slot.rope_head_dim else source))
    return out


def llm_metadata(spec: LlmSpec, name: str) -> Metadata:
    """The model's keys; general.file_type and the tokenizer's are added by others."""
    family = _FAMILIES[spec.arch]
    eps = Keys.Attention.LAYERNORM_RMS_EPS if family.norm == "rms" else Keys.Attention.LAYERNORM_EPS
    keys: Metadata = {
        Keys.General.ARCHITECTURE: text(spec.arch),
        Keys.General.TYPE: text("model"),
        Keys.General.NAME: text(name),
        Keys.LLM.CONTEXT_LENGTH: u32(spec.context_length),
        Keys.LLM.EMBEDDING_LENGTH: u32(spec.hidden),
        Keys.LLM.BLOCK_COUNT: u32(spec.layers),
        Keys.LLM.FEED_FORWARD_LENGTH: u32(spec.ffn),
        Keys.LLM.VOCAB_SIZE: u32(spec.vocab_size),
        Keys.Attention.HEAD_COUNT: u32(spec.heads),
        Keys.Attention.HEAD_COUNT_KV: u32(spec.kv_heads),
        eps: f32(spec.norm_eps),
        Keys.Rope.DIMENSION_COUNT: u32(spec.rope_dims),
        Keys.Rope.FREQ_BASE: f32(spec.rope_theta),
    }
    if spec.head_dim * spec.heads != spec.hidden:
        keys |= {Keys.Attention.KEY_LENGTH: u32(spec.head_dim), Keys.Attention.VALUE_LENGTH: u32(spec.head_dim)}
    if spec.rope_linear_factor is not None:
        keys |= {Keys.Rope.SCALING_TYPE: text("linear"), Keys.Rope.SCALING_FACTOR: f32(spec.rope_linear_factor)}
    if spec.arch == "stablelm":
        keys[Keys.LLM.USE_PARALLEL_RESIDUAL] = boolean(spec.parallel_residual)
    return {key.format(arch=spec.arch): value for key, value in keys.items()}
