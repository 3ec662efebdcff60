"""Tokenizers: what goes into the GGUF, how a splitting rule is recognised, and the way back."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint
from gguf import TokenType
from tokenizers_fixture import save_tokenizer

from converters.readers.gguf_file import open_gguf
from converters.tokenizers import load_tokenizer, tokenizer_from_gguf, tokenizer_metadata
from edgemed.cli import run
from edgemed.core.conversation import TEMPLATES
from edgemed.core.errors import CheckpointError, InputError, UnsupportedError
from edgemed.core.manifest import load_artifact

ARCH = {"llama": "llama", "mistral": "llama", "smollm": "llama", "qwen2": "qwen2", "phi": "phi2", "stablelm": "stablelm"}
PRE = {"llama": "default", "mistral": "default", "smollm": "smollm", "qwen2": "qwen2", "phi": "phi-2", "stablelm": "stablelm2"}


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("family", list(ARCH))
def test_laid_out_by_id_and_filled_up(tmp_path: Path, family: str) -> None:
    count = save_tokenizer(tmp_path, family)
    spec = load_tokenizer(tmp_path, count + 10, ARCH[family], apart=False)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    assert all(spec.tokens[i] == token for token, i in data["model"]["vocab"].items())
    assert spec.pre == PRE[family]
    assert spec.tokens[-1] == f"[PAD{count + 9}]" and spec.types[-10:] == [TokenType.UNUSED] * 10
    if spec.model == "llama":
        assert (spec.bos_id, spec.eos_id, spec.unk_id, spec.add_bos, spec.merges) == (1, 2, 0, True, None)
        assert spec.types[:4] == [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.BYTE]
        assert spec.scores is not None and len(spec.scores) == count + 10
    else:
        assert spec.merges and spec.scores is None and not spec.add_bos and spec.space_prefix == "none"


@pytest.mark.parametrize(
    ("normalizer", "apart", "space"),
    [("legacy", False, "each"), ("first", False, "first"), ("first", True, "chunk"), ("never", True, "none")],
)
def test_leading_blank(tmp_path: Path, normalizer: str, apart: bool, space: str) -> None:
    count = save_tokenizer(tmp_path, "llama", normalizer=normalizer)
    spec = load_tokenizer(tmp_path, count, "llama", apart=apart)
    assert (spec.space_prefix, spec.add_space_prefix) == (space, space != "none")


def test_sentencepiece_file_gives_the_same(tmp_path: Path) -> None:
    count = save_tokenizer(tmp_path, "llama")
    want = load_tokenizer(tmp_path, count + 3, "llama", apart=True)
    assert want.scores is not None
    pieces = b"".join(_piece(t, s, k) for t, s, k in zip(want.tokens[:count], want.scores, want.types, strict=False))
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(pieces + _message(2, b"\x18\x02") + _message(3, b"\x18\x01"))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_patch>": count}))
    spec = load_tokenizer(tmp_path, count + 3, "llama", apart=True)
    assert spec.tokens[:count] == want.tokens[:count] and spec.types[:count] == want.types[:count]
    assert (spec.tokens[count], spec.types[count]) == ("<im_patch>", TokenType.USER_DEFINED)
    assert (spec.bos_id, spec.eos_id, spec.space_prefix) == (1, 2, "each")
    (tmp_path / "tokenizer.model").write_bytes(pieces[:-3])
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(tmp_path, count, "llama", apart=True)


def _message(number: int, body: bytes) -> bytes:
    assert len(body) < 128
    return bytes([number << 3 | 2, len(body)]) + body


def _piece(token: str, score: float, kind: int) -> bytes:
    text = token.encode()
    return _message(1, bytes([10, len(text)]) + text + b"\x15" + struct.pack("<f", score) + bytes([24, kind]))


def test_vocab_and_merges_files(tmp_path: Path) -> None:
    count = save_tokenizer(tmp_path, "phi")
    want = load_tokenizer(tmp_path, count, "phi2", apart=True)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|endoftext|>": count - 1}))
    assert load_tokenizer(tmp_path, count, "phi2", apart=True) == want
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path, count, "llama", apart=True)


def test_unknown_splitting_rule_is_refused_unless_named(tmp_path: Path) -> None:
    count = save_tokenizer(tmp_path, "qwen2")
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    change(
        tmp_path / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    )
    with pytest.raises(UnsupportedError, match="splitting rule"):
        load_tokenizer(tmp_path, count, "qwen2", apart=False)
    assert load_tokenizer(tmp_path, count, "qwen2", apart=False, pre="qwen2").pre == "qwen2"


def test_a_known_splitting_rule_is_not_talked_over(tmp_path: Path) -> None:
    count = save_tokenizer(tmp_path, "qwen2")
    known = load_tokenizer(tmp_path, count, "qwen2", apart=False).pre
    with pytest.raises(InputError, match=f"known \\('{known}'\\), found 'nope'"):
        load_tokenizer(tmp_path, count, "qwen2", apart=False, pre="nope")


def test_more_tokens_than_rows_and_other_models(tmp_path: Path) -> None:
    count = save_tokenizer(tmp_path, "llama")
    with pytest.raises(CheckpointError, match=f"below the embedding's {count - 1} rows"):
        load_tokenizer(tmp_path, count - 1, "llama", apart=False)
    change(tmp_path / "tokenizer.json", model={"type": "Unigram", "vocab": []})
    with pytest.raises(UnsupportedError, match="Unigram"):
        load_tokenizer(tmp_path, count, "llama", apart=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="damaged"):
        load_tokenizer(tmp_path, count, "llama", apart=False)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("tokenizer.model", _message(1, b"\x0a\x01a\x12\x02ab")),  # a score of two bytes
        ("tokenizer.model", b"\x0a\xff\xff"),
        ("added_tokens.json", b'{"<a>": "b"}'),
        ("added_tokens.json", b'{"<a>": -1}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": 1}}'),
        ("vocab.json", b"{}"),
        ("vocab.json", b'{"a": [1]}'),
        ("merges.txt", b"\xff\xfe\xfa"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, data: bytes) -> None:
    count = save_tokenizer(tmp_path, "phi")
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    if name != "tokenizer.model":
        (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (tmp_path / "merges.txt").write_text("a b")
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path, count, "phi2", apart=True)
    assert caught.value.hint


def test_bos_is_the_templates(tmp_path: Path) -> None:
    for family, template, expected in (("llama", "v1", True), ("llama", "chatml", False), ("qwen2", "v1", False)):
        count = save_tokenizer(tmp_path / family, family)
        spec = load_tokenizer(tmp_path / family, count, ARCH[family], apart=True)
        assert tokenizer_metadata(spec, TEMPLATES[template])["tokenizer.ggml.add_bos_token"].value is expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "smollm"])
def test_through_a_gguf_and_back(tmp_path: Path, family: str) -> None:
    import gguf

    count = save_tokenizer(tmp_path, family)
    spec = replace(load_tokenizer(tmp_path, count + 2, ARCH[family], apart=True), add_bos=False)  # as the template has it
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", ARCH[family])
    for key, value in tokenizer_metadata(spec, TEMPLATES["chatml"]).items():
        writer.add_key_value(key, value.value, value.type, value.item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert tokenizer_from_gguf(open_gguf(tmp_path / "t.gguf").fields, count + 2, tmp_path) == spec


def test_a_splitting_rule_can_be_named_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_checkpoint(tmp_path / "source", "hf", "qwen2", "siglip").source
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    steps = [split, {"type": "ByteLevel", "use_regex": False}]
    change(source / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    arguments = ["convert", str(source), "--bits", "16", "--out", str(tmp_path / "model"), "--no-verify"]
    assert run(arguments) == 1
    assert "--pre" in capsys.readouterr().err
    assert run([*arguments, "--pre", "qwen2"]) == 0
    assert open_gguf(load_artifact(tmp_path / "model").llm_path).fields["tokenizer.ggml.pre"] == "qwen2"
