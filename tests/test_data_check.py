"""edgemed data check: bad rows, broken and missing images, duplicate ids, leakage by pixels, labels; and its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from edgemed.cli.app import app
from edgemed.core.errors import DatasetError
from edgemed.data.check import SplitSource, check_splits
from edgemed.data.pixels import find_leaks, hash_image


def row(number: int, image: str, text: str = "<image>\nIs it normal?", answer: str = "yes") -> dict[str, object]:
    return {"id": f"r{number}", "image": image, "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": answer}]}


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    for i in range(4):
        Image.effect_noise((20, 16), 60).convert("RGB").save(tmp_path / f"{i}.png")
    (tmp_path / "train.json").write_text(json.dumps([row(0, "0.png"), row(1, "1.png"), row(2, "1.png")]))
    (tmp_path / "validate.json").write_text(json.dumps([row(0, "2.png"), row(1, "3.png")]))
    return tmp_path


def check(folder: Path, *splits: str) -> list[str]:
    return check_splits([SplitSource("llava", folder, split) for split in splits or ("train", "validate")]).problems


def test_sound_sets_have_no_problems(sets: Path) -> None:
    report = check_splits([SplitSource("llava", sets, split) for split in ("train", "validate")])
    assert report.problems == [] and report.leaks == ()
    assert [(len(s.samples), s.images, s.same_pixels) for s in report.splits] == [(3, 2, 0), (2, 2, 0)]


def test_the_same_pixels_under_another_name_and_format_are_a_leak(sets: Path) -> None:
    Image.open(sets / "1.png").save(sets / "3.bmp")
    (sets / "validate.json").write_text(json.dumps([row(0, "2.png"), row(1, "3.bmp")]))
    assert check(sets) == ["llava train and llava validate share 1 images: 1.png = 3.bmp"]
    wide, tall = Image.new("RGB", (20, 10)), Image.new("RGB", (10, 20))
    for name, image in (("wide", wide), ("tall", tall)):
        image.save(sets / f"{name}.png")
    hashes = {name: {sets / f"{name}.png": hash_image(sets / f"{name}.png")} for name in ("wide", "tall")}
    assert find_leaks(hashes) == []


def test_everything_that_is_wrong_is_named_and_counted(sets: Path) -> None:
    (sets / "0.png").unlink()
    (sets / "1.png").write_bytes(b"")
    bad = [row(5, "2.png", "no marker"), row(6, "2.png", "<image> <image>"), row(7, "2.png", answer=" "), row(1, "2.png")]
    (sets / "train.json").write_text(json.dumps([*json.loads((sets / "train.json").read_text()), *bad]))
    problems = "\n".join(check(sets, "train"))
    assert "3 rows that cannot be read: Expected 1 <image> in row 3" in problems
    assert "Expected an answer in row 5" in problems
    assert "1 images that are missing: " in problems and "1 images that are broken: 1.png: Expected an image" in problems
    assert "1 ids that several rows have: r1" in problems


def test_a_set_with_no_sound_row_is_told_and_one_that_is_not_there_refused(sets: Path) -> None:
    (sets / "train.json").write_text(json.dumps([row(0, "0.png", "no marker")]))
    assert "llava train: no rows" in check(sets, "train")
    with pytest.raises(DatasetError, match="Expected the file"):
        check(sets, "test")


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["data", "check", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_tells_by_its_exit_code_and_as_json(sets: Path) -> None:
    code, out, _ = run(f"llava={sets}", "--split", "train", "--split", "validate")
    assert code == 0 and "Nothing to object to." in out
    (sets / "2.png").unlink()
    code, out, err = run(f"llava={sets}", "--split", "train", "--split", "validate", "--split", "test", "--json")
    found = json.loads(out.splitlines()[-1])
    assert code == 1 and [s["rows"] for s in found["splits"]] == [3, 2] and len(found["problems"]) == 1
    assert found["splits"][1]["missing"] == [str(sets / "2.png")] and "Expected the file" in err


def test_labels_and_lengths_are_those_of_training(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    pytest.importorskip("torch", reason="fine-tuning needs the train extra")
    from tests.checkpoints import make_checkpoint

    model = str(make_checkpoint(tmp_path_factory.mktemp("llava"), "hf", "smollm", "siglip").source)
    code, out, _ = run(f"llava={sets}", "--model", model, "--template", "chatml", "--json")
    labels = json.loads(out.splitlines()[-1])["splits"][0]["labels"]
    assert code == 0 and labels["template"] == "chatml"
    assert labels["tokens"]["longest"] > labels["image_tokens"] and labels["answer_tokens"]["median"] >= 3
    code, out, _ = run(f"llava={sets}", "--model", model, "--template", "chatml", "--max-tokens", "16")
    assert code == 1 and "3 rows have more than 16 tokens" in out
    result = CliRunner().invoke(app, ["data", "check", f"llava={sets}", "--model", model])
    assert isinstance(result.exception, Exception) and "--template" in str(getattr(result.exception, "hint", ""))
