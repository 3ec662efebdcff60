"""The one rule for names: published spellings, what is dropped, what is refused."""

from __future__ import annotations

import pytest

from converters.readers.names import canonical_name
from edgemed.core.errors import CheckpointError, UnsupportedError

SPELLINGS = {
    ("llm", "model.layers.0.self_attn.q_proj.weight"): [
        "model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "model.language_model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
    ],
    ("llm", "lm_head.weight"): ["lm_head.weight", "language_model.lm_head.weight"],
    ("llm", "model.final_layernorm.bias"): ["model.final_layernorm.bias", "language_model.model.final_layernorm.bias"],
    ("projector", "linear_1.weight"): [
        "multi_modal_projector.linear_1.weight",
        "model.multi_modal_projector.linear_1.weight",
        "model.mm_projector.0.weight",
        "model.mm_projector.weight",
        "mm_projector.0.weight",
        "connector._connector.0.weight",
        "_connector.0.weight",
        "_connector.weight",
    ],
    ("projector", "linear_2.bias"): ["multi_modal_projector.linear_2.bias", "model.mm_projector.2.bias", "connector._connector.2.bias"],
    ("tower", "encoder.layers.3.mlp.fc1.weight"): [
        "vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
        "vision_tower.encoder.layers.3.mlp.fc1.weight",
        "model.vision_tower.encoder.layers.3.mlp.fc1.weight",
        "model.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
        "vision_tower._vision_tower.vision_model.encoder.layers.3.mlp.fc1.weight",
        "vision_model.encoder.layers.3.mlp.fc1.weight",
        "encoder.layers.3.mlp.fc1.weight",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("want", "name"), [(want, name) for want, names in SPELLINGS.items() for name in names])
def test_published_spellings(want: tuple[str, str], name: str) -> None:
    assert canonical_name(name) == want


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "vision_tower.vision_model.embeddings.position_ids",
        "model.vision_tower.vision_tower.vision_model.head.probe",
        "vision_model.head.mlp.fc1.weight",
        "head.attention.in_proj_weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "visual_projection.weight",
        "logit_scale",
    ],
)
def test_what_is_left_out(name: str) -> None:
    assert canonical_name(name) is None


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("model.layers.0.mlp.deepspeed_moe.experts.deepspeed_experts.0.fc1.weight", UnsupportedError),
        ("model.layers.0.mlp.meta_moe.fc1.weight", UnsupportedError),
        ("model.image_tower.image_tower.vision_model.encoder.layers.0.mlp.fc1.weight", UnsupportedError),
        ("model.mm_projector.4.weight", UnsupportedError),
        ("model.mm_projector.queries", UnsupportedError),
        ("_connector.latents", UnsupportedError),
        ("model.image_newline", CheckpointError),
        ("transformer.h.0.attn.weight", CheckpointError),
    ],
)
def test_what_is_refused(name: str, error: type[CheckpointError]) -> None:
    with pytest.raises(error, match=name.split(".")[-1]):
        canonical_name(name)
