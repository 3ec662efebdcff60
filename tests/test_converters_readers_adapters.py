"""Adapters: PEFT's own merge is the reference; a GGUF adapter written by us merges to the same, also over a GGUF, also in Q8_0."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, Reference, build_llm, lora_pairs, make_checkpoint, merge_lora, save_json, save_lora

from converters.adapters import save_gguf_adapter
from converters.readers import open_checkpoint
from converters.readers.gguf_file import open_gguf
from converters.tensors import read_all
from edgemed.core.errors import CheckpointError, InputError, UnsupportedError

RANK, ALPHA = 32, 16.0


def with_adapter(folder: Path, family: str, reader: str = "gguf", **config: Any) -> tuple[Reference, Path]:
    """A checkpoint without adapter, and a PEFT folder for its language model; the reference's parts are the merged ones."""
    reference = make_checkpoint(folder / "base", reader, family, "siglip")
    pairs = lora_pairs(reference.parts, RANK, 3, "F16")
    save_lora(folder / "lora", pairs, r=RANK, lora_alpha=ALPHA, **config)
    scale = ALPHA / np.sqrt(RANK) if config.get("use_rslora") else ALPHA / RANK
    reference.parts = merge_lora(reference.parts, pairs, float(scale))
    return reference, folder / "lora"


def distance(reference: Reference, adapter: Path) -> float:
    checkpoint = open_checkpoint(reference.source, adapter=adapter, **reference.options)
    assert checkpoint.reader.endswith("+lora")
    worst = 0.0
    for name, source in checkpoint.llm.tensors.items():
        want = reference.parts.llm[name if name in reference.parts.llm else "model.embed_tokens.weight"].numpy()
        worst = max(worst, float(np.linalg.norm(read_all(source) - want) / np.linalg.norm(want)))
    return worst


@pytest.mark.parametrize("family", [*FAMILIES, "smollm"])
def test_gguf_adapter_over_a_gguf(tmp_path: Path, family: str) -> None:
    reference, lora = with_adapter(tmp_path, family)
    llm = open_checkpoint(reference.source, **reference.options).llm
    for quant, tolerance in (("F32", 1e-6), ("F16", 1e-3), ("Q8_0", 1e-2)):
        out = tmp_path / f"{quant}.gguf"
        save_gguf_adapter(lora, out, llm, quant)
        assert distance(reference, out) <= tolerance
    assert distance(reference, lora) <= 1e-6  # the PEFT folder itself goes over a GGUF, too


def test_gguf_adapter_over_other_layouts_and_rslora(tmp_path: Path) -> None:
    reference, lora = with_adapter(tmp_path, "llama", "hf", use_rslora=True)
    save_gguf_adapter(lora, tmp_path / "a.gguf", open_checkpoint(reference.source).llm, "F32")
    assert distance(reference, tmp_path / "a.gguf") <= 1e-6
    assert distance(reference, lora) <= 1e-6


def test_gguf_adapter_is_what_llama_cpp_expects(tmp_path: Path) -> None:
    reference, lora = with_adapter(tmp_path, "llama")
    llm = open_checkpoint(reference.source, **reference.options).llm
    save_gguf_adapter(lora, tmp_path / "a.gguf", llm, "Q8_0")
    file = open_gguf(tmp_path / "a.gguf")
    assert file.fields["general.type"] == "adapter" and file.fields["adapter.type"] == "lora"
    assert file.fields["general.architecture"] == "llama" and file.fields["adapter.lora.alpha"] == ALPHA
    assert len(file.tensors) == llm.layers * 7 * 2
    assert {t.type for t in file.tensors.values()} == {gguf.GGMLQuantizationType.Q8_0}
    a, b = file.tensors["blk.0.attn_q.weight.lora_a"], file.tensors["blk.0.attn_q.weight.lora_b"]
    assert a.shape == (RANK, llm.hidden) and b.shape == (llm.heads * llm.head_dim, RANK)


def test_merge_is_pefts_own(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    reference = make_checkpoint(tmp_path / "base", "hf", "llama", "clip")
    config = LoraConfig(
        r=8, lora_alpha=12, target_modules=["q_proj", "v_proj", "down_proj"], rank_pattern={"down_proj": 4},
        alpha_pattern={"layers.1.self_attn.q_proj": 40}, modules_to_save=["lm_head"], init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(build_llm(reference.parts.text_config, reference.parts.llm), config)
        with torch.no_grad():
            model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
        model.save_pretrained(tmp_path / "lora")
        merged = model.merge_and_unload().state_dict()
    reference.parts.llm = {k: v.clone() for k, v in merged.items()}
    assert distance(reference, tmp_path / "lora") <= 1e-6


def test_transposed_storage(tmp_path: Path) -> None:
    from converters.tensors import ArrayTensor, LoraTensor

    rng = np.random.default_rng(0)
    base, a, b = (rng.normal(size=s).astype(np.float32) for s in ((6, 5), (2, 6), (5, 2)))
    merged = LoraTensor(ArrayTensor("w", base), a, b, 0.5, "lora", transpose=True)
    np.testing.assert_allclose(merged.read(1, 4), (base + 0.5 * (b @ a).T)[1:4], rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"use_dora": True}, UnsupportedError, "DoRA"),
        ({"peft_type": "IA3"}, UnsupportedError, "IA3"),
        ({"r": 5}, CheckpointError, "rank 5"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str) -> None:
    reference, lora = with_adapter(tmp_path, "llama")
    save_json(lora / "adapter_config.json", {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA} | change)
    with pytest.raises(error, match=words):
        distance(reference, lora)


def test_adapter_of_another_model(tmp_path: Path) -> None:
    reference, lora = with_adapter(tmp_path / "a", "phi")
    other = make_checkpoint(tmp_path / "b", "gguf", "llama", "siglip")
    llm = open_checkpoint(reference.source, **reference.options).llm
    save_gguf_adapter(lora, tmp_path / "phi.gguf", llm, "F16")
    with pytest.raises(CheckpointError, match="adapter for llama"):
        open_checkpoint(other.source, adapter=tmp_path / "phi.gguf", **other.options)
    with pytest.raises(CheckpointError, match="fc1|dense"):
        open_checkpoint(other.source, adapter=lora, **other.options)
    with pytest.raises(CheckpointError, match="of type lora"):
        open_checkpoint(other.source, adapter=other.source, **other.options)


def test_missing_base_and_wrong_type(tmp_path: Path) -> None:
    reference, lora = with_adapter(tmp_path, "llama", "hf", base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="base of the adapter"):
        open_checkpoint(lora)
    assert open_checkpoint(lora, base=reference.source).reader == "hf+lora"
    with pytest.raises(InputError, match="Q8_0"):
        save_gguf_adapter(lora, tmp_path / "a.gguf", open_checkpoint(reference.source).llm, "Q4_0")
    assert not (tmp_path / "a.gguf").exists()
