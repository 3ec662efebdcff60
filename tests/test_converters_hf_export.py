"""`convert --to hf`: every layout as transformers' own model, with the source's rows, logits and token ids; what it cannot hold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with transformers")

from typer.testing import CliRunner  # noqa: E402

from converters import safetensors_writer  # noqa: E402
from converters.convert import plan_llm  # noqa: E402
from converters.hf_export import export_hf, with_image_token  # noqa: E402
from converters.readers import open_checkpoint  # noqa: E402
from converters.recipes import Recipe as Types  # noqa: E402
from converters.safetensors_writer import encode, write_weights  # noqa: E402
from converters.tensors import ArrayTensor, GrownTensor, read_all  # noqa: E402
from edgemed.cli.app import app  # noqa: E402
from edgemed.core.errors import CheckpointError, InputError, UnsupportedError  # noqa: E402
from edgemed.core.probe import relative_l2  # noqa: E402
from tests.checkpoints import IMAGE_PX, READERS, make_checkpoint, normalisation  # noqa: E402
from tests.test_pipeline_tokens import QUESTIONS  # noqa: E402
from tests.tokenizers_fixture import save_tokenizer  # noqa: E402

# Each layout, family and tower at least once; Phi's head has a bias, see below.
CASES = [
    ("hf", "llama", "clip"),
    ("hf", "stablelm", "siglip"),
    ("llava", "mistral", "siglip"),
    ("llava", "qwen2", "clip"),
    ("factory", "llama", "siglip"),
    ("lora", "qwen2", "siglip"),
    ("delta", "llama", "clip"),
    ("gguf", "smollm", "siglip"),
    ("gguf", "mistral", "clip"),
]


def rows_and_logits(folder: Path, tower: str, text: list[int]) -> tuple[Any, Any, Any]:
    """(pixels, rows of an image, logits after a 1, the image and `text`) by transformers from a folder."""
    from transformers import LlavaForConditionalGeneration

    model: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    pixels = np.random.default_rng(3).integers(0, 256, (IMAGE_PX, IMAGE_PX, 3), np.uint8)
    mean, std = normalisation(tower)
    x = ((torch.from_numpy(pixels.astype(np.float32)) / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)[None]
    with torch.no_grad():
        rows = model.get_image_features(pixel_values=x).pooler_output[0]
        ids = [1, *[model.config.image_token_id] * len(rows), *text]
        return pixels, rows.numpy(), model(input_ids=torch.tensor([ids]), pixel_values=x).logits[0].numpy()


def source_ids(folder: Path, text: str) -> list[int]:
    """By tokenizer.json itself: transformers puts another rule of blanks in its place for some classes."""
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text, add_special_tokens=False).ids)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("reader", "family", "tower"), CASES)
def test_transformers_computes_what_the_source_computes(tmp_path: Path, reader: str, family: str, tower: str) -> None:
    from transformers import AutoTokenizer

    reference = make_checkpoint(tmp_path / "source", reader, family, tower)
    checkpoint = open_checkpoint(reference.source, **reference.options)
    out = export_hf(checkpoint, tmp_path / "out")
    pixels, rows, logits = rows_and_logits(out, tower, [7, 9, 30])
    right = reference.vision_embeds(pixels)
    assert relative_l2(rows, right) <= 1e-6
    wanted = reference.logits([1], right, [7, 9, 30])
    assert relative_l2(logits[:, : wanted.shape[1]], wanted) <= 1e-5

    again = open_checkpoint(out)
    assert (again.image, again.template, again.tower.layers) == (checkpoint.image, checkpoint.template, checkpoint.tower.layers)
    for name, tensor in checkpoint.llm.tensors.items():
        assert np.array_equal(read_all(again.llm.tensors[name])[: tensor.shape[0]], read_all(tensor)), name
    mine = AutoTokenizer.from_pretrained(out)
    for text in (*QUESTIONS, " a", "\nWhat"):
        text = text.replace("<image>", "")  # a token of its own now
        assert mine(text, add_special_tokens=False)["input_ids"] == source_ids(tmp_path / "source", text), text
    assert mine.convert_tokens_to_ids("<image>") == json.loads((out / "config.json").read_text())["image_token_index"]


def test_every_layout_is_a_case() -> None:
    assert {reader for reader, _, _ in CASES} == set(READERS)


def test_that_a_model_learnt_with_rounding_is_kept_and_told_to_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def llm_types(self: Types, shapes: Any, rounded: bool = False) -> Any:
        told.append(rounded)
        return original(self, shapes, rounded)

    original = Types.llm_types
    monkeypatch.setattr(Types, "llm_types", llm_types)
    reference = make_checkpoint(tmp_path / "source", "llava", "llama", "siglip")
    for rounded in (False, True):
        out = export_hf(replace(open_checkpoint(reference.source), rounded=rounded), tmp_path / f"out-{rounded}")
        again = open_checkpoint(out)
        assert again.rounded is rounded
        plan_llm(again, Types.of(bits=4))
    assert told == [False, True]


def test_an_embedding_without_a_spare_row_grows(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path / "source", "llava", "llama", "siglip")
    checkpoint = open_checkpoint(reference.source)
    rows = checkpoint.llm.vocab_size
    for i, kind in enumerate(checkpoint.tokenizer.types):
        if kind == 5:
            checkpoint.tokenizer.types[i] = 1
    grown = with_image_token(checkpoint)
    assert (grown.llm.vocab_size % 64, grown.tokenizer.tokens.index("<image>")) == (0, rows)
    table, before = (c.llm.tensors["model.embed_tokens.weight"] for c in (grown, checkpoint))
    assert isinstance(table, GrownTensor) and table.shape[0] == grown.llm.vocab_size > rows
    np.testing.assert_allclose(table.read(rows, rows + 2), [read_all(before).mean(0)] * 2, rtol=1e-5)
    assert np.array_equal(table.read(0, rows), read_all(before))
    assert table.read(rows - 1, rows + 1).shape == (2, before.shape[1])
    export_hf(checkpoint, tmp_path / "out")
    assert rows_and_logits(tmp_path / "out", "siglip", [4])[2].shape[1] == grown.llm.vocab_size


def test_what_transformers_cannot_hold_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    linear = make_checkpoint(tmp_path / "linear", "llava", "llama", "clip", projector="linear")
    with pytest.raises(UnsupportedError, match="a projector of two layers"):
        export_hf(open_checkpoint(linear.source), tmp_path / "out")
    phi = make_checkpoint(tmp_path / "phi", "llava", "phi", "siglip")
    with pytest.raises(UnsupportedError, match="a head without a bias"):
        export_hf(open_checkpoint(phi.source), tmp_path / "out")
    full = make_checkpoint(tmp_path / "full", "llava", "qwen2", "siglip")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="Expected no files"):
        export_hf(open_checkpoint(full.source), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_phi_whose_head_has_no_bias_is_written(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path / "source", "hf", "phi", "siglip")
    from safetensors.torch import load_file, save_file

    path = reference.source / "model.safetensors"
    state = load_file(path)
    name = next(k for k in state if k.endswith("lm_head.bias"))
    state[name] = torch.zeros_like(state[name])
    save_file(state, path, metadata={"format": "pt"})
    reference.parts.llm["lm_head.bias"] = torch.zeros_like(reference.parts.llm["lm_head.bias"])
    out = export_hf(open_checkpoint(reference.source), tmp_path / "out")
    pixels, rows, logits = rows_and_logits(out, "siglip", [7, 9])
    wanted = reference.logits([1], reference.vision_embeds(pixels), [7, 9])
    assert relative_l2(logits[:, : wanted.shape[1]], wanted) <= 1e-5


def test_bfloat16_is_rounded_as_torch_does(tmp_path: Path) -> None:
    special = [0, -0.0, 1e38, 3.4e38, np.inf, -np.inf, 1e-40]
    values = np.concatenate([np.random.default_rng(0).standard_normal(5000), special]).astype(np.float32)
    theirs = torch.from_numpy(values).bfloat16().view(torch.int16).numpy()
    assert np.array_equal(encode(values, "BF16").view(np.int16), theirs)
    assert np.isnan((encode(np.array([np.nan], np.float32), "BF16").astype(np.uint32) << 16).view(np.float32)).all()


def test_shards_with_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.numpy import load_file

    monkeypatch.setattr(safetensors_writer, "SHARD_BYTES", 1000)
    tensors = {f"t{i}": ArrayTensor(f"t{i}", np.full((10, 10), i, np.float32)) for i in range(5)}
    written: list[int] = []
    names = write_weights(tmp_path, tensors, written.append)
    assert len(names) == 3 and sum(written) == 2000
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {n: float(load_file(tmp_path / where[n])[n].mean()) for n in tensors} == {f"t{i}": float(i) for i in range(5)}


@pytest.mark.parametrize("normalizer", ["legacy", "first", "never"])
def test_each_rule_of_blanks_is_kept(tmp_path: Path, normalizer: str) -> None:
    from transformers import AutoTokenizer

    source = make_checkpoint(tmp_path / "source", "llava", "llama", "siglip").source
    save_tokenizer(source, "llama", normalizer=normalizer)
    out = export_hf(open_checkpoint(source), tmp_path / "out")
    mine = AutoTokenizer.from_pretrained(out)
    for text in ("What is shown?", " a", "\nWhat", "a</s>b", ""):
        assert mine(text, add_special_tokens=False)["input_ids"] == source_ids(source, text), text


def test_the_command(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "llava", "qwen2", "siglip").source
    done = CliRunner().invoke(app, ["convert", str(source), "--to", "hf", "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout.splitlines()[-1]) == {"checkpoint": str(tmp_path / "out"), "reader": "llava"}
    for arguments, message in ((["--to", "onnx"], "--to gguf or hf"), (["--to", "hf", "--bits", "4"], "Expected no --bits")):
        refused = CliRunner().invoke(app, ["convert", str(source), *arguments])
        assert isinstance(refused.exception, InputError) and message in refused.exception.message


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    values = np.ones((4, 8), np.float32)
    values[1, 2] = np.nan
    with pytest.raises(CheckpointError, match="finite weights.*'layer.w'"):
        write_weights(tmp_path, {"w": ArrayTensor("layer.w", values)}, lambda n: None)
