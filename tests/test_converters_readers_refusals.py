"""Bad checkpoints: each gets one error of our tree, with one sentence and a hint, and nothing else gets out."""

from __future__ import annotations

import json
import pickle
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import hf_names, make_checkpoint, make_parts, save_json, save_mmproj_gguf, save_weights

from converters.readers import open_checkpoint
from converters.tensors import read_all
from edgemed.core.errors import CheckpointError, EdgemedError, InputError, MissingExtraError, UnsupportedError


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    save_json(path, {k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None})


def edit_text(folder: Path, **changes: Any) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config={k: v for k, v in text.items() if not k.startswith("rope_")} | changes)


def drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def cut_header(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"\xff" * 100)


def wrong_shape(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text | {"intermediate_size": 96})


def more_layers(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text | {"num_hidden_layers": 3})


def untied_text(folder: Path) -> dict[str, Any]:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"].pop("language_model.lm_head.weight")
    save_json(index, data)
    return json.loads((folder / "config.json").read_text())["text_config"]


def endless_layers(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder, text_config=text | {"num_hidden_layers": 2**40})


def bad_index(folder: Path) -> None:
    save_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../model.safetensors"}})


def preprocessor(**changes: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "preprocessor_config.json"
        save_json(path, json.loads(path.read_text()) | changes)

    return change


CASES: list[tuple[str, Callable[[Path], object], type[EdgemedError], str]] = [
    ("missing shard", drop_shard, CheckpointError, "00002-of-00002"),
    ("cut shard", cut_shard, CheckpointError, "found a file of"),
    ("cut header", cut_header, CheckpointError, "header"),
    ("wrong shape", wrong_shape, CheckpointError, r"shape \[96, 64\]"),
    ("missing layer", more_layers, CheckpointError, "layers.2"),
    ("endless layers", endless_layers, CheckpointError, "layers"),
    ("a context of 41 bits", lambda f: edit_text(f, max_position_embeddings=1 << 40), CheckpointError, "max_position_embeddings"),
    ("one mean for all", preprocessor(image_mean=0.5), CheckpointError, "three numbers for image_mean"),
    ("a mean that is text", preprocessor(image_mean=["a", "b", "c"]), CheckpointError, "three numbers for image_mean"),
    ("a mean that is no number", preprocessor(image_mean=[0.5, 0.5, float("nan")]), CheckpointError, "three numbers for image_mean"),
    ("a deviation of zero", preprocessor(image_std=[0.5, 0.5, 0.0]), CheckpointError, "std.2"),
    ("index that leaves the folder", bad_index, CheckpointError, "plain file names"),
    ("no config", lambda f: (f / "config.json").unlink(), CheckpointError, "config.json"),
    ("config of noise", lambda f: (f / "config.json").write_bytes(b"\x00\xff{"), CheckpointError, "JSON"),
    ("unknown architecture", lambda f: edit(f, architectures=["GPT2LMHeadModel"]), UnsupportedError, "GPT2LMHeadModel"),
    ("mixture of experts", lambda f: edit(f, architectures=["MoELLaVAPhiForCausalLM"]), UnsupportedError, "MoELLaVAPhi"),
    ("no output matrix", lambda f: edit(f, text_config=untied_text(f)), CheckpointError, "lm_head"),
    ("moe key", lambda f: edit(f, moe={"moe_enable": True}), UnsupportedError, "dense"),
    ("several feature layers", lambda f: edit(f, vision_feature_layer=[-2, -5]), UnsupportedError, "one vision feature layer"),
    ("feature layer too deep", lambda f: edit(f, vision_feature_layer=9), CheckpointError, "feature layer 9"),
    ("projector activation", lambda f: edit(f, projector_hidden_act="relu"), UnsupportedError, "relu"),
    ("no tokenizer", lambda f: (f / "tokenizer.json").unlink(), CheckpointError, "tokenizer"),
    ("rope scaling in a word", lambda f: edit_text(f, rope_scaling="linear"), CheckpointError, "rope scaling"),
    ("rope factor in words", lambda f: edit_text(f, rope_parameters={"rope_theta": "1e4"}), CheckpointError, "rope_theta"),
    ("epsilon in words", lambda f: edit_text(f, rms_norm_eps="small"), CheckpointError, "rms_norm_eps"),
    ("unknown language model", lambda f: edit(f, text_config={"model_type": "gpt_neox"}), UnsupportedError, "gpt_neox"),
]  # fmt: skip


@pytest.mark.parametrize(("break_it", "error", "words"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_broken_folder(tmp_path: Path, break_it: Callable[[Path], object], error: type[EdgemedError], words: str) -> None:
    make_checkpoint(tmp_path, "hf", "llama", "clip", shards=2)
    break_it(tmp_path)
    with pytest.raises(error, match=words) as caught:
        open_checkpoint(tmp_path)
    assert caught.value.hint and caught.value.message.endswith(".") and "\n" not in caught.value.message


def test_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "nothing")


def test_unknown_and_moe_tensors(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "hf", "llama", "clip")
    state = hf_names(reference.parts, "4")
    for name, error in {
        "language_model.model.layers.0.mlp.deepspeed_moe.gate.wg.weight": UnsupportedError,
        "language_model.model.layers.0.mlp.extra.weight": CheckpointError,
        "model.image_newline": CheckpointError,
        "multi_modal_projector.linear_3.weight": UnsupportedError,
        "model.mm_projector.4.weight": UnsupportedError,
    }.items():
        save_weights(tmp_path, state | {name: torch.zeros(2)})
        with pytest.raises(error, match=name.rsplit(".", 2)[-2]):
            open_checkpoint(tmp_path)


def test_options_that_do_not_fit_the_source(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "hf", "llama", "clip")
    for option in ({"mmproj": tmp_path}, {"vision_tower": tmp_path}, {"image_mode": "zoom"}, {"template": "nothing"}):
        with pytest.raises(InputError):
            open_checkpoint(tmp_path, **option)  # type: ignore[arg-type]


def test_missing_tower_names_what_to_get(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "llava", "llama", "clip", inside=False)
    (reference.source / "vision_tower" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="tower"):
        open_checkpoint(tmp_path)
    (reference.source / "vision_tower" / "config.json").unlink()
    with pytest.raises(CheckpointError, match="openai/clip-vit-large-patch14-336"):
        open_checkpoint(tmp_path)


def test_delta_over_another_base(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path / "a", "delta", "llama", "clip")
    other = make_parts("llama", "clip", 480, text={"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1})
    save_weights(tmp_path / "base", other.llm)
    with pytest.raises(CheckpointError, match="of the base"):
        open_checkpoint(reference.source, base=tmp_path / "base")


def test_delta_whose_base_has_other_ranks(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "delta", "llama", "clip")
    base = make_parts("llama", "clip", 480).llm
    save_weights(tmp_path / "base", base | {"lm_head.weight": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="of the base"):
        open_checkpoint(reference.source, **reference.options)


def test_delta_without_its_base(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "delta", "llama", "clip")
    with pytest.raises(CheckpointError, match="looks like a delta") as caught:
        open_checkpoint(reference.source)
    assert "--base" in caught.value.hint


def as_pickle(folder: Path, **save: Any) -> None:
    reference = make_checkpoint(folder, "hf", "llama", "clip")
    (folder / "model.safetensors").unlink()
    state = {k: v.half() for k, v in hf_names(reference.parts, "4").items()}
    torch.save(state, folder / "pytorch_model.bin", **save)


@pytest.mark.parametrize("archive", [True, False])
def test_pickle_of_tensors_is_read(tmp_path: Path, archive: bool) -> None:
    as_pickle(tmp_path, _use_new_zipfile_serialization=archive)
    tensor = open_checkpoint(tmp_path).llm.tensors["lm_head.weight"]
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert np.array_equal(read_all(tensor), state["language_model.lm_head.weight"].float().numpy())


def test_pickle_needs_torch_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_pickle(tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match="pickle") as caught:
        open_checkpoint(tmp_path)
    assert "edgemed[train]" in caught.value.hint


class Bomb:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_pickle_that_would_run_code(tmp_path: Path, how: str) -> None:
    as_pickle(tmp_path)
    path, trace = tmp_path / "pytorch_model.bin", tmp_path / "it ran"
    if how == "torch":
        torch.save({"a": Bomb(trace)}, path)
    else:
        path.write_bytes(pickle.dumps({"a": Bomb(trace)}))
    with pytest.raises(CheckpointError, match="would run code"):
        open_checkpoint(tmp_path)
    assert not trace.exists()


def test_damaged_pickle(tmp_path: Path) -> None:
    as_pickle(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    whole = path.read_bytes()
    for data in (b"", b"noise" * 50, whole[:-1], whole[:3000]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path)


def test_gguf_cut_swapped_or_noise(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "gguf", "llama", "siglip")
    llm, mmproj = reference.source, reference.options["mmproj"]
    narrow = make_parts("llama", "siglip", 480, text={"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1})
    save_mmproj_gguf(tmp_path / "other.gguf", narrow)
    cases = {"mmproj.gguf": (tmp_path / "other.gguf").read_bytes(), "llm.gguf": mmproj.read_bytes()}
    for path in (llm, mmproj):
        whole = path.read_bytes()
        swapped = cases[path.name]
        for data in (whole[:-1], whole[: len(whole) // 2], whole[:30], b"", swapped, bytes(range(256)) * 40, b"GGUF" + b"\xff" * 4000):
            path.write_bytes(data)
            with pytest.raises(CheckpointError):
                checkpoint = open_checkpoint(llm, **reference.options)
                # a cut inside the file's last padding is all that a header cannot show
                [read_all(t) for t in (*checkpoint.llm.tensors.values(), *checkpoint.tower.tensors.values())]
        path.write_bytes(whole)
    assert open_checkpoint(llm, **reference.options).llm.layers == 2


def test_gguf_with_flipped_bytes_never_gets_past_our_errors(tmp_path: Path) -> None:
    reference = make_checkpoint(tmp_path, "gguf", "phi", "clip")
    rng = random.Random(0)
    for path in (reference.source, reference.options["mmproj"]):
        whole = path.read_bytes()
        for _ in range(150):
            data = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(4, min(len(data), rng.choice((60, 2000, 30000))))] = rng.randrange(256)
            path.write_bytes(data)
            try:
                open_checkpoint(reference.source, **reference.options)
            except EdgemedError as error:
                assert error.hint
        path.write_bytes(whole)


def test_a_base_for_what_is_no_delta(tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path, "hf", "llama", "siglip")
    with pytest.raises(CheckpointError, match="Expected a delta to add to the base .* found whole weights") as caught:
        open_checkpoint(whole.source, base=whole.source)
    assert "Leave --base out" in caught.value.hint
