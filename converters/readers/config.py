"""config.json of a language model or a tower → LlmSpec and TowerSpec, with the tensors checked against it.

    llm = build_llm(config, groups.llm, folder)
    tower = build_tower(vision_config, groups.tower, folder, layer=-2, feature="patch")

Keys that a file leaves out have the defaults of the model type in transformers. Knows no layouts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from converters.checkpoint import LlmSpec, Tensors, TowerSpec
from converters.llm import Slot, check_llm, check_tensors
from edgemed.core.errors import CheckpointError, UnsupportedError

Config = Mapping[str, Any]
Arch = Literal["llama", "qwen2", "phi2", "stablelm"]
Activation = Literal["quick_gelu", "gelu", "gelu_pytorch_tanh"]
Feature = Literal["patch", "cls_patch", "default", "full"]


@dataclass(frozen=True)
class _LlmType:
    """An HF model type: llama.cpp's architecture and transformers' defaults."""

    arch: Arch
    vocab: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int | None  # None: as many as heads
    context: int
    eps: float = 1e-6
    rotary: float = 1.0


LLM_TYPES: dict[str, _LlmType] = {
    "llama": _LlmType("llama", 32000, 4096, 11008, 32, 32, None, 2048),
    "mistral": _LlmType("llama", 32000, 4096, 14336, 32, 32, 8, 131072),
    "qwen2": _LlmType("qwen2", 151936, 4096, 22016, 32, 32, 32, 32768),
    "phi": _LlmType("phi2", 51200, 2048, 8192, 24, 32, None, 2048, 1e-5, 0.5),
    "stablelm": _LlmType("stablelm", 50304, 2560, 6912, 32, 32, 32, 4096, 1e-5, 0.25),
    "stablelm_epoch": _LlmType("stablelm", 50304, 2560, 6912, 32, 32, 32, 4096, 1e-5, 0.25),
}
# The activation inside each architecture's graph in llama.cpp; phi's tanh GELU has two names.
_LLM_ACTIVATIONS = {"llama": ("silu",), "qwen2": ("silu",), "stablelm": ("silu",), "phi2": ("gelu_new", "gelu_pytorch_tanh")}


def first(config: Config, *keys: str, default: Any = None) -> Any:
    """The first of `keys` that is there and not null."""
    for key in keys:
        if config.get(key) is not None:
            return config[key]
    return default


def whole(config: Config, key: str, default: int | None, where: Path | str) -> int:
    """A positive integer of a configuration. Raises CheckpointError."""
    value = first(config, key, default=default)
    if isinstance(value, list) and len(set(value)) == 1:  # sizes may be written as [336, 336]
        value = value[0]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
        raise CheckpointError(f"Expected a positive whole number of 32 bits for '{key}' in {where}, found {value!r}.", "Check config.json.")
    return value


def positive(config: Config, *keys: str, default: float, where: Path | str) -> float:
    """A positive number of a configuration, by the first of `keys` that is there. Raises CheckpointError."""
    value = first(config, *keys, default=default)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise CheckpointError(f"Expected a positive number for '{keys[0]}' in {where}, found {value!r}.", "Check config.json.")
    return float(value)


def build_llm(config: Config, model_type: str, tensors: Tensors, where: Path | str) -> LlmSpec:
    """The language model that `config` describes. Raises CheckpointError, UnsupportedError."""
    if model_type not in LLM_TYPES:
        raise UnsupportedError(
            f"Expected a language model out of {', '.join(LLM_TYPES)} in {where}, found '{model_type}'.",
            "Convert a model of one of these families.",
        )
    kind = LLM_TYPES[model_type]
    _refuse_llm_features(config, kind.arch, where)
    hidden = whole(config, "hidden_size", kind.hidden, where)
    heads = whole(config, "num_attention_heads", kind.heads, where)
    if hidden % heads and config.get("head_dim") is None:
        raise CheckpointError(f"Expected hidden_size in {where} to be a multiple of {heads} heads, found {hidden}.", "Check config.json.")
    head_dim = whole(config, "head_dim", hidden // heads, where) if kind.arch == "llama" else hidden // heads
    rope = _rope(config, where)
    rotary = {**config, **{key: value for key, value in rope.items() if value is not None}}
    factor = positive(rotary, "partial_rotary_factor", "rope_pct", default=kind.rotary, where=where)
    spec = LlmSpec(
        arch=kind.arch,
        layers=whole(config, "num_hidden_layers", kind.layers, where),
        hidden=hidden,
        ffn=whole(config, "intermediate_size", kind.ffn, where),
        heads=heads,
        kv_heads=whole(config, "num_key_value_heads", kind.kv_heads or heads, where),
        head_dim=head_dim,
        vocab_size=whole(config, "vocab_size", kind.vocab, where),
        context_length=_context(config, kind, where),
        norm_eps=positive(config, "rms_norm_eps", "layer_norm_eps", "norm_eps", default=kind.eps, where=where),
        rope_theta=positive(rotary, "rope_theta", default=10000.0, where=where),
        rope_dims=int(head_dim * factor) if kind.rotary < 1 else head_dim,
        tensors=drop_tied_head(config, tensors, where),
        rope_linear_factor=float(rope["factor"]) if first(rope, "rope_type", "type") == "linear" else None,
        parallel_residual=kind.arch == "stablelm" and bool(config.get("use_parallel_residual", False)),
    )
    check_llm(spec, where)
    return spec


def drop_tied_head(config: Config, tensors: Tensors, where: Path | str) -> Tensors:
    """Without a copy of the embedding that a tied checkpoint may carry as lm_head. Raises CheckpointError for a missing one."""
    tied = config.get("tie_word_embeddings")
    if tied is False and "lm_head.weight" not in tensors:
        raise CheckpointError(f"Expected tensor 'lm_head.weight' in {where}, found none.", "Check that the checkpoint is complete.")
    if not tied:
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def _context(config: Config, kind: _LlmType, where: Path | str) -> int:
    # llama.cpp's graphs for these architectures attend to everything: past a sliding window they would differ from the source.
    length = whole(config, "max_position_embeddings", kind.context, where)
    window = config.get("sliding_window") if config.get("use_sliding_window", kind.arch == "llama") else None
    return min(length, window) if isinstance(window, int) and window > 0 else length


def _rope(config: Config, where: Path | str) -> dict[str, Any]:
    found = first(config, "rope_parameters", "rope_scaling", default={})
    if not isinstance(found, Mapping):
        raise CheckpointError(f"Expected an object for rope scaling in {where}, found {found!r}.", "Check config.json.")
    rope = dict(found)
    kind = first(rope, "rope_type", "type", default="default")
    if kind not in ("default", "linear"):
        raise UnsupportedError(
            f"Expected default or linear rotary positions in {where}, found '{kind}'.", "Use a checkpoint without rope scaling."
        )
    if kind == "linear":
        rope["factor"] = positive(rope, "factor", default=math.nan, where=where)
    return rope


def has_experts(config: Config) -> bool:
    """Whether Med-MoE's own section says that experts are in use."""
    moe = config.get("moe")
    return bool(moe.get("moe_enable", True)) if isinstance(moe, Mapping) and moe else bool(moe)


def _refuse_llm_features(config: Config, arch: Arch, where: Path | str) -> None:
    if has_experts(config) or config.get("num_local_experts") or config.get("num_experts"):
        raise UnsupportedError(
            f"Expected a dense language model in {where}, found a mixture of experts.",
            "llama.cpp has no architecture for Med-MoE's always-on expert with an unnormalised top-1 router; use a dense checkpoint.",
        )
    if config.get("qk_layernorm"):
        raise UnsupportedError(
            f"Expected attention without q and k norms in {where}, found qk_layernorm.", "Use a checkpoint without them."
        )
    activation = first(config, "hidden_act", default=_LLM_ACTIVATIONS[arch][0])
    if activation not in _LLM_ACTIVATIONS[arch]:
        raise UnsupportedError(
            f"Expected the activation {' or '.join(_LLM_ACTIVATIONS[arch])} in {where}, found '{activation}'.",
            "llama.cpp's graph has no other.",
        )


@dataclass(frozen=True)
class _TowerType:
    """An HF tower type with transformers' defaults."""

    kind: Literal["clip", "siglip"]
    patch: int
    eps: float
    activation: Activation


TOWER_TYPES: dict[str, _TowerType] = {
    "clip_vision_model": _TowerType("clip", 32, 1e-5, "quick_gelu"),
    "siglip_vision_model": _TowerType("siglip", 16, 1e-6, "gelu_pytorch_tanh"),
    "siglip": _TowerType("siglip", 16, 1e-6, "gelu_pytorch_tanh"),
    "clip": _TowerType("clip", 32, 1e-5, "quick_gelu"),
}


def build_tower(config: Config, tensors: Tensors, where: Path | str, layer: Any, feature: str) -> TowerSpec:
    """The tower up to the hidden state `layer`; `feature` says which tokens are kept.

    patch and default leave the first token out, whatever it is (SigLIP has no CLS: its first patch is lost, as in training);
    cls_patch and full keep all. Raises CheckpointError, UnsupportedError.
    """
    model_type = str(first(config, "model_type", default="clip_vision_model"))
    if model_type not in TOWER_TYPES:
        raise UnsupportedError(f"Expected a CLIP or SigLIP tower in {where}, found '{model_type}'.", "Only these towers convert.")
    if feature not in get_args(Feature):
        raise UnsupportedError(
            f"Expected a vision feature out of {', '.join(get_args(Feature))} in {where}, found '{feature}'.", "Check config.json."
        )
    kind = TOWER_TYPES[model_type]
    drop_first = feature in ("patch", "default")
    activation = first(config, "hidden_act", default=kind.activation)
    if activation not in get_args(Activation):
        raise UnsupportedError(f"Expected a GELU activation in the tower of {where}, found '{activation}'.", "Only GELU variants convert.")
    present = count_layers(tensors)
    spec = TowerSpec(
        kind=kind.kind,
        layers=feature_layers(layer, whole(config, "num_hidden_layers", 12, where), present, where),
        hidden=whole(config, "hidden_size", 768, where),
        ffn=whole(config, "intermediate_size", 3072, where),
        heads=whole(config, "num_attention_heads", 12, where),
        image_size_px=whole(config, "image_size", 224, where),
        patch_size_px=whole(config, "patch_size", kind.patch, where),
        norm_eps=positive(config, "layer_norm_eps", default=kind.eps, where=where),
        activation=activation,
        tensors=tensors,
        skip_first_token=kind.kind == "siglip" and drop_first,
        keep_cls=kind.kind == "clip" and not drop_first,
    )
    check_tower(spec, present, where)
    return spec


def count_layers(tensors: Tensors) -> int:
    """How many encoder layers are there; a configuration may still count one that was cut off."""
    return len({name.split(".")[2] for name in tensors if name.startswith("encoder.layers.")})


def feature_layers(layer: Any, configured: int, present: int, where: Path | str) -> int:
    """How many layers run for hidden_states[layer] of a tower configured with `configured` layers (index 0 is the embedding)."""
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise UnsupportedError(
            f"Expected one vision feature layer in {where}, found {layer!r}.", "Models that join several layers do not convert."
        )
    run = layer if layer >= 0 else configured + 1 + layer
    if not 1 <= run <= present:
        raise CheckpointError(
            f"Expected vision feature layer {layer} among the tower's {present} layers in {where}, found none.", "Check config.json."
        )
    return run


def check_tower(spec: TowerSpec, present: int, where: Path | str) -> None:
    """Raises CheckpointError for a tensor that is missing, unknown or of another shape than the configuration says."""
    if spec.hidden % spec.heads:
        raise CheckpointError(
            f"Expected the tower's width in {where} to be a multiple of {spec.heads} heads, found {spec.hidden}.", "Check config.json."
        )
    check_tensors(spec.tensors, {slot.name: slot for slot in _tower_slots(spec, present)}, f"the tower of {where}")


def _tower_slots(spec: TowerSpec, present: int) -> list[Slot]:
    h, p, clip = spec.hidden, spec.patch_size_px, spec.kind == "clip"
    shapes: list[tuple[str, tuple[int, ...], bool]] = [
        ("embeddings.patch_embedding.weight", (h, 3, p, p), False),
        ("embeddings.position_embedding.weight", (spec.patches + clip, h), False),
    ]
    shapes += [("embeddings.class_embedding", (h,), False)] if clip else [("embeddings.patch_embedding.bias", (h,), False)]
    for norm, optional in (("pre_layrnorm", False), ("post_layernorm", True)):
        if clip or optional:
            shapes += [(f"{norm}.weight", (h,), optional), (f"{norm}.bias", (h,), optional)]
    for i in range(present):
        at = f"encoder.layers.{i}"
        linear = {f"self_attn.{n}": (h, h) for n in ("q_proj", "k_proj", "v_proj", "out_proj")}
        linear |= {"mlp.fc1": (spec.ffn, h), "mlp.fc2": (h, spec.ffn)}
        for name, shape in linear.items():
            shapes += [(f"{at}.{name}.weight", shape, False), (f"{at}.{name}.bias", shape[:1], False)]
        for name in ("layer_norm1", "layer_norm2"):
            shapes += [(f"{at}.{name}.weight", (h,), False), (f"{at}.{name}.bias", (h,), False)]
    return [Slot(name, "", shape, optional) for name, shape, optional in shapes]
