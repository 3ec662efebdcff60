"""Every published spelling of a tensor's name → its canonical name in one of three groups.

    groups = split_names(weights.tensors)
    groups.llm["model.layers.0.self_attn.q_proj.weight"]
    groups.tower["encoder.layers.0.mlp.fc1.weight"], groups.projector["linear_1.weight"]

One rule for all layouts: prefixes are taken off, what is left must be a known root. Anything else is an error. Knows no shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from converters.checkpoint import TensorSource
from edgemed.core.errors import CheckpointError, UnsupportedError

_TOWER_ROOTS = r"(?:embeddings|encoder|pre_layrnorm|post_layernorm|head)\."
_INDEX = {"0": "linear_1", "2": "linear_2", None: "linear_1"}
# Buffers that old checkpoints carry, SigLIP's pooling head, and the text half of a CLIP or SigLIP model used as a tower folder.
_DROPPED = re.compile(
    r"rotary_emb\.inv_freq$|position_ids$|^(?:text_model|text_projection|visual_projection)\.|^logit_(?:scale|bias)$"
    r"|^(?:.*\.)?(?:vision_tower|vision_model)\.(?:.*\.)?head\.|^head\."
)
_MOE = re.compile(r"\.(?:deepspeed_moe|meta_moe|image_tower|image_spatial_proj|block_sparse_moe|experts)\.")
_LLM = re.compile(
    r"(?:language_model\.model\.|model\.language_model\.(?:model\.)?|model\.)?((?:layers|embed_tokens|norm|final_layernorm)\..+)"
)
_HEAD = re.compile(r"(?:model\.)?(?:language_model\.)?(lm_head\..+)")
_PROJECTOR = re.compile(r"(?:model\.)?multi_modal_projector\.(linear_[12]\.(?:weight|bias))")
_PROJECTOR_INDEX = re.compile(r"(?:(?:model\.)?mm_projector|(?:connector\.)?_connector)\.(?:(\d+)\.)?(weight|bias)")
_TOWER = re.compile(r"(?:(?:model\.)?vision_tower\.)?(?:_?vision_tower\.)?(?:vision_model\.)?(" + _TOWER_ROOTS + r".+)")
_OTHER_PROJECTOR = re.compile(r"(?:model\.)?(?:mm_projector|multi_modal_projector)\.|(?:connector\.)?_connector\.")


@dataclass
class Groups:
    """Tensors under canonical names."""

    llm: dict[str, TensorSource] = field(default_factory=dict)
    tower: dict[str, TensorSource] = field(default_factory=dict)
    projector: dict[str, TensorSource] = field(default_factory=dict)


def canonical_name(name: str) -> tuple[str, str] | None:
    """(group, canonical name), or None for what is dropped. Raises UnsupportedError or CheckpointError for what is not known."""
    name = name.replace(".base_layer.", ".")  # a PEFT wrapper saved by name (TinyLLaVA_Factory's LoRA folders)
    if _DROPPED.search(name):
        return None
    if _MOE.search(name):
        raise UnsupportedError(
            f"Expected a dense model, found the mixture-of-experts tensor '{name}'.",
            "llama.cpp has no architecture for Med-MoE's always-on expert with an unnormalised top-1 router; use a dense checkpoint.",
        )
    for pattern, make in _RULES:
        if match := pattern.fullmatch(name):
            return make(match)
    if _OTHER_PROJECTOR.match(name):
        raise UnsupportedError(
            f"Expected a projector of one or two linear layers, found its tensor '{name}'.", "Only linear and mlp2x_gelu convert."
        )
    raise CheckpointError(f"Expected tensors of a LLaVA model, found '{name}'.", "Check that this is the right checkpoint.")


def _projector_index(match: re.Match[str]) -> tuple[str, str]:
    if match[1] not in _INDEX:
        raise UnsupportedError(
            f"Expected a projector of at most two layers, found its tensor '{match[0]}'.", "Only linear and mlp2x_gelu convert."
        )
    return "projector", f"{_INDEX[match[1]]}.{match[2]}"


_RULES: tuple[tuple[re.Pattern[str], Callable[[re.Match[str]], tuple[str, str]]], ...] = (
    (_LLM, lambda m: ("llm", f"model.{m[1]}")),
    (_HEAD, lambda m: ("llm", m[1])),
    (_PROJECTOR, lambda m: ("projector", m[1])),
    (_PROJECTOR_INDEX, _projector_index),
    (_TOWER, lambda m: ("tower", m[1])),
)


def split_names(tensors: Mapping[str, TensorSource]) -> Groups:
    """All tensors of a checkpoint by group. Raises CheckpointError for an unknown name or two spellings of one tensor."""
    groups = Groups()
    for name, tensor in tensors.items():
        place = canonical_name(name)
        if place is None:
            continue
        group: dict[str, TensorSource] = getattr(groups, place[0])
        if place[1] in group:
            raise CheckpointError(
                f"Expected one tensor for {place[1]}, found '{group[place[1]].name}' and '{name}'.", "Remove one of the files."
            )
        group[place[1]] = tensor
    return groups
