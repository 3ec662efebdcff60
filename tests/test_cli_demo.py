"""`edgemed demo` and the embedded default, with a two-layer model in the embedded one's place: the same way, other files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from checkpoints import IMAGE_PX, make_checkpoint
from PIL import Image

from edgemed.cli import run
from edgemed.core.files import sha256_file

REGISTRY = """
schema_version = 1
[[model]]
name = "edgemed-demo"
title = "edgemed-demo"
role = "embedded"
licence = "Apache-2.0"
architecture = "X"
llm = "L"
tower = "V"
projector = "mlp2x_gelu"
template = "chatml"
[model.image]
size_px = {size_px}
mode = "pad"
pad_colour = [1, 2, 3]
mean = [0.5, 0.5, 0.5]
std = [0.5, 0.5, 0.5]
[model.sources.model]
kind = "bundled"
path = "{folder}/llm.gguf"
sha256 = "{llm_hash}"
[model.sources.mmproj]
kind = "bundled"
path = "{folder}/mmproj.gguf"
sha256 = "{mmproj_hash}"
[[model.artifacts]]
name = "edgemed-demo-4bit"
bits = 4
"""


@pytest.fixture(autouse=True)
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_checkpoint(tmp_path / "source", "gguf", "smollm", "siglip")
    hashes = {f"{name}_hash": sha256_file(tmp_path / "source" / f"{name}.gguf") for name in ("llm", "mmproj")}
    (tmp_path / "models.toml").write_text(REGISTRY.format(**hashes, size_px=IMAGE_PX, folder=(tmp_path / "source").as_posix()))
    Image.new("RGB", (30, 20), (120, 120, 120)).save(tmp_path / "radiograph.jpg")
    monkeypatch.setattr("edgemed.core.registry.registry_path", lambda: tmp_path / "models.toml")
    monkeypatch.setattr("edgemed.cli.demo._DEMO", tmp_path)
    return tmp_path


def test_demo_goes_the_whole_way(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo"]) == 0
    said = capsys.readouterr()
    assert said.out.count("Question: ") == said.out.count("Answer: ") == 3
    assert "never replaces a clinician" in said.err
    for part in ("bits a weight", "Verified", "card: static", "seen: peak", "decoding"):
        assert part in said.out


def test_demo_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--json", "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bits"] == 4 and len(result["answers"]) == 3 and result["artifact"].endswith("edgemed-demo-4bit")
    assert result["parity"]["files"] == 2 and result["trace"]["seed_static_bytes"] > 0


def test_what_is_left_out_means_the_embedded_model(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["ask", "Q", "--max-tokens", "1", "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["model"] == "edgemed-demo" and "Converting" in said.err
    assert run(["verify", "--json"]) == 0
    assert "Converting" not in capsys.readouterr().err
    assert run(["models", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["state"] == "converted: edgemed-demo-4bit"
    assert run(["models", "pull", "edgemed-demo", "--json"]) == 0
    assert run(["models", "verify", "edgemed-demo"]) == 0


def test_a_missing_radiograph_is_told(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (embedded / "radiograph.jpg").unlink()
    assert run(["demo", "--quiet"]) == 1
    assert "bundled radiograph" in capsys.readouterr().err


def test_a_damaged_part_is_not_converted_and_does_not_hide_the_others(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = embedded / "source" / "mmproj.gguf"
    data = bytearray(part.read_bytes())
    data[-1] ^= 0x10
    part.write_bytes(data)
    assert run(["convert", "--quiet"]) == 1
    assert "SHA-256" in capsys.readouterr().err
    assert run(["models", "verify"]) == 1
    said = capsys.readouterr()
    assert said.out.count("hashes agree") == 1 and "found another" in said.out and "found 1 that do not" in said.err
