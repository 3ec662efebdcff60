"""Every reader, family and tower: the tensors it yields are the reference's, and so are shapes, counts and preparation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import (
    FAMILIES,
    HF_SPELLINGS,
    IMAGE_PX,
    READERS,
    TOWERS,
    Reference,
    hf_config,
    hf_names,
    lora_pairs,
    make_checkpoint,
    make_parts,
    merge_lora,
    normalisation,
    save_json,
    save_lora,
    save_tower,
    save_weights,
)
from tokenizers_fixture import save_tokenizer

from converters.checkpoint import Checkpoint, Tensors
from converters.readers import llava, open_checkpoint
from converters.tensors import RopeRows, read_all
from edgemed.core.contract import Contract, save_contract
from edgemed.core.conversation import TEMPLATES, to_jinja
from edgemed.core.errors import CheckpointError


def assert_same(tensors: Tensors, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    for name, source in tensors.items():
        # phi2 and stablelm have an output matrix in a GGUF, tied or not
        want = expected[name if name in expected else "model.embed_tokens.weight"].numpy()
        got = read_all(source)
        assert got.dtype == np.float32 and got.shape == want.shape
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max(), name
        middle = max(1, source.shape[0] // 2)
        assert np.array_equal(source.read(1, middle), got[1:middle]), name


def assert_reads(reference: Reference, **more: Any) -> Checkpoint:
    checkpoint = open_checkpoint(reference.source, **reference.options, **more)
    # a merge is one float32 product and sum; torch and numpy order the terms differently
    tolerance = 1e-6 if reference.reader == "lora" else 0.0
    assert_same(checkpoint.llm.tensors, reference.parts.llm, tolerance)
    assert_same(checkpoint.tower.tensors, reference.parts.tower, 0.0)
    assert_same(checkpoint.projector.tensors, reference.parts.projector, 0.0)
    assert set(reference.parts.llm) <= set(checkpoint.llm.tensors)
    assert checkpoint.tower.layers == 2
    assert len(checkpoint.tokenizer.tokens) == checkpoint.llm.vocab_size
    pixels = np.zeros((IMAGE_PX, IMAGE_PX, 3), np.uint8)
    assert checkpoint.tower.image_tokens == reference.vision_embeds(pixels).shape[0]
    return checkpoint


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reader", READERS)
def test_reader_yields_the_reference_weights(tmp_path: Path, reader: str, family: str, tower: str) -> None:
    checkpoint = assert_reads(make_checkpoint(tmp_path, reader, family, tower))
    assert checkpoint.reader.startswith("llava+lora" if reader == "lora" else reader)
    assert checkpoint.files and all(record.size_bytes > 0 for record in checkpoint.files.values())
    root = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    assert all((root / name).is_file() for name in checkpoint.files)


@pytest.mark.parametrize("spelling", HF_SPELLINGS)
@pytest.mark.parametrize(("dtype", "shards"), [("BF16", 1), ("F32", 3), ("F16", 2)])
def test_hf_spellings_types_and_shards(tmp_path: Path, spelling: str, dtype: str, shards: int) -> None:
    assert_reads(make_checkpoint(tmp_path, "hf", "llama", "clip", spelling=spelling, dtype=dtype, shards=shards))


@pytest.mark.parametrize("family", ["qwen2", "phi"])
def test_files_that_transformers_saves_itself(tmp_path: Path, family: str) -> None:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    reference = make_checkpoint(tmp_path, "hf", family, "siglip")
    config = LlavaConfig(**{k: v for k, v in hf_config(reference.parts, -2, "full").items() if k not in ("architectures", "model_type")})
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(reference.parts.tower, strict=False)
    model.model.language_model.load_state_dict(
        {k.removeprefix("model."): v for k, v in reference.parts.llm.items() if k.startswith("model.")}
    )
    model.lm_head.load_state_dict(
        {k.removeprefix("lm_head."): v for k, v in reference.parts.llm.items() if k.startswith("lm_head.")}, strict=False
    )
    model.model.multi_modal_projector.load_state_dict(reference.parts.projector)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path)
    if family == "phi":  # its head has no bias there
        reference.parts.llm["lm_head.bias"].zero_()
    assert_reads(reference)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_reference_is_what_transformers_computes(tmp_path: Path, tower: str, strategy: str) -> None:
    from transformers import LlavaForConditionalGeneration

    reference = make_checkpoint(tmp_path, "hf", "llama", tower, strategy=strategy, spelling="5")
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    pixels = np.random.default_rng(0).integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), dtype=np.uint8)
    embeds = reference.vision_embeds(pixels)
    mean, std = normalisation(tower)
    x = (torch.from_numpy(pixels).float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    ids = [1, 300, *[5] * len(embeds), 310, 320]  # 5 is the image token's id in the fixture's config
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=x.permute(2, 0, 1)[None]).logits[0].numpy()
    np.testing.assert_allclose(reference.logits([1, 300], embeds, [310, 320]), logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("feature", "tokens"), [("patch", 16), ("cls_patch", 17)])
def test_llava_tower_of_its_own_and_kept_cls(tmp_path: Path, feature: str, tokens: int) -> None:
    checkpoint = assert_reads(make_checkpoint(tmp_path, "llava", "mistral", "clip", inside=False, feature=feature, shards=2))
    assert (checkpoint.tower.image_tokens, checkpoint.tower.keep_cls) == (tokens, feature == "cls_patch")
    assert (checkpoint.image.mode, checkpoint.image.pad_colour) == ("pad", (122, 116, 104))


@pytest.mark.parametrize(("layer", "run"), [(-1, 3), (-2, 2), (-3, 1), (2, 2)])
def test_feature_layer(tmp_path: Path, layer: int, run: int) -> None:
    reference = make_checkpoint(tmp_path, "hf", "llama", "clip", feature_layer=layer)
    assert open_checkpoint(reference.source).tower.layers == run


def test_seed_tower_lacks_its_last_layer_and_drops_no_token(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "llava", "llama", "siglip")
    checkpoint = assert_reads(reference)
    assert "encoder.layers.2.mlp.fc1.weight" not in checkpoint.tower.tensors
    assert (checkpoint.tower.layers, checkpoint.tower.image_tokens, checkpoint.image.pad_colour) == (2, 16, (127, 127, 127))


def test_a_named_tower_goes_before_the_one_inside(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path / "model", "llava", "llama", "clip")
    other = make_parts("llama", "clip", 480, seed=5)
    save_tower(tmp_path / "tower", other)
    checkpoint = open_checkpoint(reference.source, vision_tower=tmp_path / "tower")
    assert_same(checkpoint.tower.tensors, other.tower, 0.0)


def test_factory_drops_the_first_patch_of_siglip(tmp_path: Path) -> None:
    tower = assert_reads(make_checkpoint(tmp_path / "a", "factory", "qwen2", "siglip", folders=True)).tower
    assert (tower.skip_first_token, tower.image_tokens) == (True, 15)
    assert assert_reads(make_checkpoint(tmp_path / "b", "factory", "phi", "siglip", strategy="cls_patch")).tower.image_tokens == 16


@pytest.mark.parametrize("reader", ["llava", "factory", "delta", "hf"])
def test_linear_projector(tmp_path: Path, reader: str) -> None:
    reference = make_checkpoint(tmp_path, reader, "llama", "clip", projector="linear")
    assert assert_reads(reference).projector.kind == "linear"


def test_delta_has_llava_med_v1s_ways(tmp_path: Path) -> None:
    checkpoint = assert_reads(make_checkpoint(tmp_path, "delta", "llama", "clip", projector="linear"))
    assert (checkpoint.template.name, checkpoint.image.mode) == ("simple", "crop")


def test_gguf_rows_of_q_and_k_go_back_to_hf(tmp_path: Path) -> None:
    checkpoint = assert_reads(make_checkpoint(tmp_path, "gguf", "llama", "siglip", dtype="F32"))
    assert isinstance(checkpoint.llm.tensors["model.layers.0.self_attn.q_proj.weight"], RopeRows)
    assert checkpoint.projector.activation == "gelu_pytorch_tanh"


def test_artifact_is_a_source_again(tmp_path: Path) -> None:
    from converters.convert import convert
    from converters.recipes import Recipe

    first = open_checkpoint(make_checkpoint(tmp_path / "source", "factory", "qwen2", "siglip").source)
    convert(first, tmp_path / "f16", Recipe.of(16))
    again = open_checkpoint(tmp_path / "f16")
    assert (again.image, again.template, again.tokenizer) == (first.image, first.template, first.tokenizer)
    assert (again.tower.layers, again.tower.skip_first_token, again.tower.image_tokens) == (2, True, 15)
    for name, source in first.llm.tensors.items():
        np.testing.assert_allclose(read_all(again.llm.tensors[name]), read_all(source), rtol=1e-3, atol=1e-4)


def test_factory_lora_beside_the_parts_of_its_base(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "factory", "llama", "clip", folders=True)
    pairs = lora_pairs(reference.parts, 4, 1, "F16")
    wrapped = {
        k.replace(".weight", ".base_layer.weight") if k.removesuffix(".weight") in pairs else k: v for k, v in reference.parts.llm.items()
    }
    save_weights(tmp_path / "language_model", wrapped)
    save_lora(tmp_path, pairs, prefix="base_model.model.language_model.", r=4, lora_alpha=8, base_model_name_or_path=None)
    reference.parts, reference.reader = merge_lora(reference.parts, pairs, 2.0), "lora"
    assert assert_reads(reference).reader == "factory+lora"


def test_template_is_found_by_its_jinja_and_can_be_named(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "hf", "smollm", "siglip")
    assert open_checkpoint(reference.source).template.name == "chatml"
    (tmp_path / "chat_template.jinja").write_text(to_jinja(TEMPLATES["llava_v1"]))
    found = open_checkpoint(reference.source)
    assert (found.template.name, found.notes) == ("llava_v1", ())
    assert open_checkpoint(reference.source, template="v1", image_mode="pad").image.pad_colour == (127, 127, 127)


def test_tied_copy_is_dropped_and_image_processor_is_followed(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "hf", "qwen2", "siglip")
    parts = reference.parts
    save_weights(tmp_path, hf_names(parts, "4") | {"language_model.lm_head.weight": parts.llm["model.embed_tokens.weight"] * 2})
    save_json(
        tmp_path / "preprocessor_config.json",
        {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225], "size": {"height": 32, "width": 32}},
    )
    checkpoint = assert_reads(reference)
    assert "lm_head.weight" not in checkpoint.llm.tensors
    assert (checkpoint.image.mode, checkpoint.image.pad_colour, checkpoint.image.mean[0]) == ("stretch", (123, 116, 103), 0.485)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("declared", [["LlamaForCausalLM"], [], None])
def test_llavas_layout_is_found_by_model_type(tmp_path: Path, family: str, declared: list[str] | None) -> None:
    reference = make_checkpoint(tmp_path, "lora", family, "clip")
    config = json.loads((tmp_path / "config.json").read_text()) | {"architectures": declared}
    save_json(tmp_path / "config.json", config)
    assert assert_reads(reference).reader == "llava+lora"
    if family == "llama":
        save_json(tmp_path / "config.json", config | {"model_type": "llava"})
        assert assert_reads(reference).reader == "llava+lora"


@pytest.mark.parametrize(("family", "bos"), [("qwen2", False), ("stablelm", False), ("llama", True)])
def test_template_has_a_bos_where_the_tokenizer_adds_one(tmp_path: Path, family: str, bos: bool) -> None:
    for reader in ("llava", "hf", "factory"):
        reference = make_checkpoint(tmp_path / reader, reader, family, "clip")
        assert open_checkpoint(reference.source, template="v1").template == TEMPLATES["v1"].model_copy(update={"bos": bos})


def test_image_markers_of_the_configuration(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "llava", "llama", "clip")
    save_json(tmp_path / "config.json", json.loads((tmp_path / "config.json").read_text()) | {"mm_use_im_start_end": True})
    template = assert_reads(reference).template
    assert (template.image_prefix, template.image_suffix) == ("<im_start>", "<im_end>")
    assert {"</s>", "<im_start>", "<im_end>"} <= set(template.control)


def test_a_published_tower_that_counts_without_its_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = make_checkpoint(tmp_path, "llava", "llama", "siglip")
    path = tmp_path / "vision_tower" / "config.json"
    save_json(path, json.loads(path.read_text()) | {"num_hidden_layers": 2})
    monkeypatch.setitem(llava._TOWERS, ("siglip", 32, 16, 8), (2, 3, 32))
    assert assert_reads(reference).tower.layers == 2


def test_what_edgemed_trained_is_tokenised_as_it_was_trained(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "hf", "llama", "siglip")
    save_tokenizer(tmp_path, "llama", normalizer="first")
    checkpoint = open_checkpoint(reference.source)
    assert checkpoint.tokenizer.space_prefix == "first"
    save_contract(tmp_path, Contract(image=checkpoint.image, template=TEMPLATES["v1"]))
    assert open_checkpoint(reference.source).tokenizer.space_prefix == "chunk"


def test_the_last_step_is_named_by_number(tmp_path: Path) -> None:
    for step in (900, 1000):
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(CheckpointError) as caught:
        llava.load_llava(tmp_path)
    assert "checkpoint-1000" in caught.value.hint
