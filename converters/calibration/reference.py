"""Any checkpoint as torch modules in float32, filled with the very weights that the converter reads.

    reference = build_reference(checkpoint)
    rows = reference.image_rows(values)              # float32 [images, 3, S, S] → [images, image_tokens, width]
    logits = reference.logits(embeds, keep)          # what the language model makes of rows and text
    reference.modules["blk.0.attn_q.weight"]         # the linear layer behind each matrix, by its GGUF name

The language model and the tower are transformers' own. Needs the `train` extra; the whole model is in memory. Knows no data sets.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.checkpoint import Checkpoint, LlmSpec, Tensors, TowerSpec
from converters.llm import llm_slots
from converters.tensors import read_checked
from converters.vision import source_names
from edgemed.core.errors import CheckpointError, MissingExtraError

# Steps between a tower's layers and the last LayerNorm, which no feature passes.
_UNUSED = ("post_layernorm", "position_ids", "head.")


def check_extra(what: str) -> None:
    """Raises MissingExtraError where torch or transformers are not installed."""
    if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
        raise MissingExtraError.of(what, "train")


@dataclass(frozen=True)
class Reference:
    """A model in evaluation mode whose weights take no gradient."""

    llm: Any
    tower: Any
    projector: Any
    # Linear layers (and the tied or untied output) by the GGUF name of their matrix.
    modules: Mapping[str, Any]
    first_row: int

    def image_rows(self, values: Any) -> Any:
        """Normalised images [images, 3, S, S] → the rows that the language model sees [images, image_tokens, width]."""
        tower = self.tower
        x = tower.embeddings(values)
        if hasattr(tower, "pre_layrnorm"):
            x = tower.pre_layrnorm(x)
        x = tower.encoder(inputs_embeds=x).last_hidden_state
        return self.projector(x[:, self.first_row :])

    def embed(self, ids: Any) -> Any:
        """Token ids → rows."""
        return self.llm.get_input_embeddings()(ids)

    def logits(self, embeds: Any, keep: Any, mask: Any = None, positions: Any = None) -> Any:
        """Logits [batch, len(keep), vocab] at the positions `keep` (int64) after embeds [batch, tokens, width].

        mask: bool [batch, 1, tokens, tokens], who sees whom; positions: int64 [batch, tokens]. Causal where left out.
        """
        extra = {} if mask is None else {"attention_mask": mask, "position_ids": positions}
        return self.llm(inputs_embeds=embeds, logits_to_keep=keep, use_cache=False, **extra).logits


def build_reference(checkpoint: Checkpoint) -> Reference:
    """The checkpoint in torch. Raises MissingExtraError, CheckpointError."""
    check_extra("Running a checkpoint in transformers")
    llm, tower = _build_llm(checkpoint.llm), _build_tower(checkpoint.tower)
    projector = _build_projector(checkpoint)
    for module in (llm, tower, projector):
        module.float().eval().requires_grad_(False)
    first = int(checkpoint.tower.kind == "clip" and not checkpoint.tower.keep_cls) + checkpoint.tower.skip_first_token
    return Reference(llm, tower, projector, _modules(checkpoint, llm, tower, projector), first)


def matrix_names(checkpoint: Checkpoint) -> dict[str, tuple[str, str]]:
    """GGUF name → (part, module) of every matrix that quantisation may round: part is llm, tower or projector."""
    out = {
        slot.gguf: ("llm", slot.name.removesuffix(".weight"))
        for slot in llm_slots(checkpoint.llm)
        if len(slot.shape) == 2 and (slot.name in checkpoint.llm.tensors or not slot.optional)
    }
    for name, source in source_names(checkpoint.tower.layers).items():
        if not name.endswith(".weight") or name.startswith(("v.patch_embd", "v.position_embd", "v.pre_ln")) or ".ln" in name:
            continue
        if name == "mm.2.weight" and checkpoint.projector.kind == "linear":
            continue  # [I, −I], exact in four bits
        out[name] = ("projector" if name.startswith("mm.") else "tower", source.removesuffix(".weight"))
    return out


def _modules(checkpoint: Checkpoint, llm: Any, tower: Any, projector: Any) -> dict[str, Any]:
    parts = {"llm": llm, "tower": tower, "projector": projector}
    return {name: parts[part].get_submodule(module) for name, (part, module) in matrix_names(checkpoint).items()}


def _build_llm(spec: LlmSpec) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, Qwen2Config, StableLmConfig

    rope: dict[str, Any] = {"rope_theta": spec.rope_theta, "rope_type": "default"}
    if spec.rope_linear_factor is not None:
        rope |= {"rope_type": "linear", "factor": spec.rope_linear_factor}
    common = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.context_length,
        "rope_parameters": rope,
        "tie_word_embeddings": "lm_head.weight" not in spec.tensors,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    first = "model.layers.0.self_attn"
    biased = any(f"{first}.{name}.bias" in spec.tensors for name in ("q_proj", "o_proj"))
    partial = {"rope_parameters": rope | {"partial_rotary_factor": spec.rope_dims / spec.head_dim}}
    config: Any = {
        "llama": lambda: LlamaConfig(**common, head_dim=spec.head_dim, rms_norm_eps=spec.norm_eps, attention_bias=biased),
        "qwen2": lambda: Qwen2Config(**common, rms_norm_eps=spec.norm_eps),
        "phi2": lambda: PhiConfig(**common | partial, layer_norm_eps=spec.norm_eps, hidden_act="gelu_new"),
        "stablelm": lambda: StableLmConfig(
            **common | partial, layer_norm_eps=spec.norm_eps, use_qkv_bias=biased, use_parallel_residual=spec.parallel_residual
        ),
    }[spec.arch]()
    model = AutoModelForCausalLM.from_config(config)
    absent = ("lm_head.weight",) if "lm_head.weight" not in spec.tensors else ()
    _fill(model, spec.tensors, (*absent, ".bias") if spec.arch == "llama" and biased else absent)
    model.tie_weights()
    return model


def _build_tower(spec: TowerSpec) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

    common = {
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "image_size": spec.image_size_px,
        "patch_size": spec.patch_size_px,
        "layer_norm_eps": spec.norm_eps,
        "hidden_act": spec.activation,
    }
    if spec.kind == "clip":
        model: Any = CLIPVisionModel(CLIPVisionConfig(**common))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**common, vision_use_head=False))
    model = getattr(model, "vision_model", model)
    _fill(model, {name: tensor for name, tensor in spec.tensors.items() if _runs(name, spec.layers)}, _UNUSED)
    return model


def _runs(name: str, layers: int) -> bool:
    piece = name.split(".")
    return not name.startswith(_UNUSED) and (piece[0] != "encoder" or int(piece[2]) < layers)


def _build_projector(checkpoint: Checkpoint) -> Any:
    from torch import nn

    spec, width = checkpoint.projector, checkpoint.llm.hidden
    module: Any = nn.Sequential()
    module.add_module("linear_1", nn.Linear(checkpoint.tower.hidden, width))
    if spec.kind == "mlp2x_gelu":
        module.add_module("gelu", nn.GELU("tanh" if spec.activation == "gelu_pytorch_tanh" else "none"))
        module.add_module("linear_2", nn.Linear(width, width))
    _fill(module, spec.tensors, (".bias",))
    return module


def _fill(module: Any, tensors: Tensors, may_lack: tuple[str, ...]) -> None:
    """Load every tensor; a bias that may be missing is zero. Raises CheckpointError."""
    import torch

    state = {name: torch.from_numpy(read_checked(t, 0, t.shape[0], "F32", "").copy()) for name, t in tensors.items()}
    for name, value in module.state_dict().items():
        if name.endswith(".bias") and name not in state and ".bias" in may_lack:
            state[name] = torch.zeros_like(value)
    result = module.load_state_dict(state, strict=False)
    missing = [name for name in result.missing_keys if not any(part in name for part in may_lack)]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"Expected the tensors that transformers' model has, found {len(missing)} missing {missing[:2]} and"
            f" {len(result.unexpected_keys)} unknown {list(result.unexpected_keys)[:2]}.",
            "Convert without --calibrate.",
        )
