"""The commands on a real two-layer model and the real engine: convert, verify, ask, bench, and what must be refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint
from dicom_fixture import PLANTED_WORDS, make_dicom, radiograph
from PIL import Image

from edgemed.cli import run
from edgemed.cli.compose import engine_settings
from edgemed.core.manifest import load_artifact


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    return Path(make_checkpoint(folder, "hf", "llama", "siglip").source)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    assert run(["convert", str(source), "--bits", "16", "--out", str(out), "--no-verify", "--quiet"]) == 0
    return out


@pytest.fixture
def artifact(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "model"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "x.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(path)
    return path


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run a command with --json; (exit code, its document, stderr)."""

    def call(*arguments: object) -> tuple[int, Any, str]:
        capsys.readouterr()
        code = run([*map(str, arguments), "--json"])
        said = capsys.readouterr()
        lines = said.out.splitlines()
        assert len(lines) <= 1, "stdout holds one document and nothing else"
        return code, json.loads(lines[0]) if lines else None, said.err

    yield call


def test_convert_writes_and_verifies(source: Path, tmp_path: Path, say: Any) -> None:
    out = tmp_path / "out"
    code, result, _ = say("convert", source, "--bits", 8, "--out", out, "--name", "tiny")
    assert code == 0 and result["name"] == "tiny" and result["bits"] == 8
    parity = result["parity"]
    assert parity["files"] == 2 and parity["vision_distance"] <= parity["vision_tolerance"] and parity["stored"]
    certificate = load_artifact(out).manifest.certificate
    assert certificate is not None and certificate.logits is not None and certificate.verified_with


def test_convert_shows_the_bits_per_weight(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(source), "--quant", "Q8_0", "--vision-quant", "F16", "--out", str(tmp_path / "o"), "--no-verify"]) == 0
    said = capsys.readouterr()
    assert "bits a weight" in said.out and "8.5" in said.out and "Q8_0" in said.out and "does not fit" not in said.err
    assert run(["convert", str(source), "--quant", "q4_k_m", "--vision-quant", "F16", "--out", str(tmp_path / "k"), "--no-verify"]) == 0
    said = capsys.readouterr()
    assert "--quant Q4_K_M does not fit most rows of this model, whose weights are mostly IQ4_NL" in said.err
    assert "--vision-quant" not in said.err


def test_convert_without_out_goes_to_edgemeds_own_folder(source: Path, say: Any) -> None:
    code, result, _ = say("convert", source, "--bits", 16, "--name", "tiny", "--no-verify")
    assert code == 0 and result["artifact"].endswith("edgemed/artifacts/tiny-F16")
    code, _, err = say("ask", "Q", "--model", "tiny-F16", "--max-tokens", 1)
    assert code == 0 and "No image was given" in err


def test_convert_without_out_stays_in_its_folder_and_takes_no_others_place(source: Path, tmp_path: Path, say: Any) -> None:
    code, result, _ = say("convert", source, "--bits", 16, "--name", "../../a b", "--no-verify")
    assert code == 0 and result["artifact"].endswith("edgemed/artifacts/a-b-F16")
    assert say("convert", source, "--bits", 16, "--name", "../../a b", "--no-verify")[0] == 0
    other = shutil.copytree(source, tmp_path / "other")
    code, _, err = say("convert", other, "--bits", 16, "--name", "a b", "--no-verify")
    assert code == 1 and "--out" in err and str(source) in err
    code, _, err = say("convert", other, "--bits", 16, "--out", result["artifact"], "--no-verify")
    assert code == 1 and f"a model made from {source}" in err and load_artifact(Path(result["artifact"])).manifest.name == "../../a b"


def test_verify_twice_and_against_transformers(artifact: Path, source: Path, say: Any) -> None:
    code, first, _ = say("verify", artifact)
    assert code == 0 and first["parity"]["logits_distance"] is None
    code, second, _ = say("verify", artifact, "--reference", source)
    assert code == 0 and second["parity"]["logits_distance"] < 1e-3
    assert second["parity"]["transformers_vision_distance"] <= 2e-3
    assert second["parity"]["transformers_logits_distance"] <= 5e-3
    certificate = load_artifact(artifact).manifest.certificate
    assert certificate is not None and certificate.transformers_logits_distance == second["parity"]["transformers_logits_distance"]


def test_verify_refuses_another_layout_as_reference(artifact: Path, tmp_path: Path, say: Any) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlavaLlamaForCausalLM"]}')
    code, _, err = say("verify", artifact, "--reference", tmp_path)
    assert code == 1 and "LlavaForConditionalGeneration" in err
    code, _, err = say("verify", artifact, "--reference", tmp_path / "none")
    assert code == 1 and "found none" in err


def test_verify_sees_other_logits(artifact: Path, say: Any) -> None:
    assert say("verify", artifact)[0] == 0
    path = artifact / "manifest.json"
    data = json.loads(path.read_text())
    data["certificate"]["logits"]["rows"] = [[-v for v in row] for row in data["certificate"]["logits"]["rows"]]
    path.write_text(json.dumps(data))
    code, _, err = say("verify", artifact)
    assert code == 1 and "last verification" in err


def test_ask_answers_with_the_advice(artifact: Path, image: Path, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code, result, err = say("ask", "What is shown?", "--image", image, "--image", image, "--model", artifact, "--max-tokens", 4)
    assert code == 0 and result["usage"]["new_tokens"] <= 4 and result["usage"]["image_tokens"] == 32
    assert "never replaces a clinician" in err and "never replaces a clinician" in result["advice"]
    assert run(["ask", "What?", "--model", str(artifact), "--max-tokens", "3", "--temperature", "1", "--seed", "7", "-q"]) == 0
    said = capsys.readouterr()
    assert said.out.endswith("\n") and "never replaces a clinician" in said.err


def test_ask_refuses_bad_images_and_long_questions(artifact: Path, tmp_path: Path, say: Any) -> None:
    text = tmp_path / "text.png"
    text.write_text("no image")
    empty = tmp_path / "empty.png"
    empty.touch()
    cases: list[tuple[list[object], str]] = [
        (["Q", "--image", tmp_path / "none.png"], "no such file"),
        ([" ", "--image", text], "found an empty text"),
        (["Q", "--image", text], "no image format"),
        (["Q", "--image", empty], "empty file"),
        (["word " * 5000], "context"),
        (["word " * 100, "--context", 50], "allow a larger context, up to"),
        ([os.fsdecode(b"\xff")], "Unicode"),
    ]
    for arguments, says in cases:
        code, result, err = say("ask", *arguments, "--model", artifact)
        assert code == 1 and result is None and says in err and "Traceback" not in err


def test_the_context_has_room_for_the_images(artifact: Path) -> None:
    loaded = load_artifact(artifact)
    llm, vision = loaded.manifest.llm.model_copy(update={"context_length": 8192}), loaded.manifest.vision
    large = replace(loaded, manifest=loaded.manifest.model_copy(update={"llm": llm}))
    assert engine_settings(large).context_tokens == 2048
    assert engine_settings(large, images=200).context_tokens == 200 * vision.image_tokens + 1024
    assert engine_settings(large, images=200, context=100).context_tokens == 100
    assert engine_settings(large, images=2000).context_tokens == 8192


def test_bench_prints_the_card_and_the_trace(artifact: Path, tmp_path: Path, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    saved = tmp_path / "card.md"
    code, result, _ = say("bench", artifact, "--device", "rtx3050", "--questions", 4, "--save", saved)
    trace = result["results"][0]
    assert code == 0 and result["device"] == "rtx3050"
    assert [phase["name"] for phase in trace["phases"]] == ["load", "image encode", "prefill", "decode", "second question"]
    assert [phase["count"] for phase in trace["phases"]] == [1, 2, 2, 4, 2] and trace["new_tokens"] == 4 * 64
    weights = sum(b["size_bytes"] for b in trace["account"] if "weights" in b["what"])
    assert trace["seed_static_bytes"] == weights < trace["seed_dynamic_bytes"] < trace["seen_bytes"] and trace["decode_tokens_per_s"] > 0
    assert "| phase: decode (emulated) |" in saved.read_text()


def test_bench_refuses_a_file_it_could_not_write_before_it_measures(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bench", str(artifact), "--save", str(tmp_path / "a.pdf")]) == 1
    assert "ends in .json, .md, .png" in capsys.readouterr().err
    assert run(["bench", str(artifact), "--save", str(tmp_path / "no" / "a.md")]) == 1
    assert "Expected the folder" in capsys.readouterr().err


def test_eval_scores_a_set(artifact: Path, tmp_path: Path, say: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "slake"
    (folder / "imgs").mkdir(parents=True)
    Image.new("RGB", (20, 30), (90, 90, 90)).save(folder / "imgs" / "a.jpg")
    rows = [
        {"qid": i, "img_name": "a.jpg", "question": "Normal?", "answer": "Yes", "answer_type": kind, "q_lang": "en"}
        for i, kind in enumerate(("CLOSED", "OPEN", "OPEN"))
    ]
    (folder / "validate.json").write_text(json.dumps(rows))
    code, result, _ = say("eval", artifact, "--dataset", f"slake={folder}", "--limit", 2)
    found = result["results"][0]
    assert code == 0 and (found["scores"]["closed_n"], found["scores"]["open_n"]) == (1, 1)
    assert [a["reference"] for a in found["answers"]] == ["Yes", "Yes"]
    assert run(["eval", str(artifact), "--dataset", f"slake={folder}", "--blank", "--quiet"]) == 0
    assert "% of 2" in capsys.readouterr().out
    code, _, err = say("eval", artifact, "--dataset", f"slake={folder}", "--split", "nonsense")
    assert code == 1 and "nonsense" in err


@pytest.mark.parametrize("which", ["llm", "mmproj"])
def test_a_byte_less_is_refused(artifact: Path, which: str, say: Any) -> None:
    loaded = load_artifact(artifact)
    path = loaded.llm_path if which == "llm" else loaded.mmproj_path
    path.write_bytes(path.read_bytes()[:-1])
    for command in (["verify", artifact], ["ask", "Q", "--model", artifact], ["bench", artifact]):
        code, _, err = say(*command)
        assert code == 1 and err.count("Error:") == 1 and "bytes in" in err


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, say: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("converters.convert.save_manifest", full)
    code, _, err = say("convert", source, "--out", tmp_path / "out" / "model")
    assert code == 1 and "Traceback" not in err
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_finetune_needs_its_settings(tmp_path: Path, say: Any) -> None:
    code, _, err = say("finetune", "align", "--config", tmp_path / "none.toml")
    assert code == 1 and "none.toml" in err


def test_ask_shows_dicom_through_a_window(artifact: Path, tmp_path: Path, say: Any) -> None:
    frames = [radiograph(12), np.fliplr(radiograph(12))]
    path = tmp_path / "wrist"
    path.write_bytes(make_dicom(frames, "jpeg2000", modality="US", WindowCenter=900, WindowWidth=1500))
    hashes = set()
    for options in ([], ["--window", "2000,500"], ["--frame", 1]):
        code, result, err = say("ask", "What?", "--image", path, "--model", artifact, "--max-tokens", 1, *options)
        assert code == 0 and "Images of this kind often have" in err
        hashes.add(result["images"][0]["pixels_sha256"])
        assert not [word for word in PLANTED_WORDS if word in json.dumps(result) + err]
    assert len(hashes) == 3
    assert result["images"][0]["frame"] == 1 and result["images"][0]["window"]["width"] == 1500
    for options, said in ((["--frame", 9], "frame from 0 to 1"), (["--window", "wide"], "CENTRE,WIDTH")):
        code, _, err = say("ask", "What?", "--image", path, "--model", artifact, *options)
        assert code == 1 and said in err
