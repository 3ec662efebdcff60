"""A folder in a file's place, a file in a folder's, links that lead in a circle, noise: one right sentence and exit code 1.

Every command with a path that comes before its heavy work; what needs a model is in test_pipeline_bad_input.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from edgemed.cli import run

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links that lead in a circle")
Fail = Callable[..., str]
FILE, FOLDER, CIRCLE, NOWHERE = "found a file", "found a folder", "found links that lead in a circle", "found a link that leads nowhere"


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where each thing lies under its name; the current folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").touch()
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "noise").write_bytes(bytes(range(128, 256)) * 20)
    (tmp_path / "deep").write_text("[" * 100_000)
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "nowhere").symlink_to("gone")
    (tmp_path / "q.csv").write_text("image,question,answer\nx.png,Is it?,yes\n")
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "urls").write_text('{"pmc_tar_url": "http://127.0.0.1:9/a.tar.gz", "image_file_path": "a.jpg", "pair_id": "1"}\n')
    (tmp_path / "phrase").write_text("a few words\n")
    (tmp_path / "phrase").chmod(0o600)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Fail:
    """Run a command that must fail; its one sentence."""

    def call(*arguments: str) -> str:
        capsys.readouterr()
        code, said = run(arguments), capsys.readouterr()
        *_, sentence, hint = said.err.splitlines()
        assert (code, said.err.count("Error: ")) == (1, 1) and sentence.startswith("Error: ") and hint.startswith("Hint: ")
        assert "unforeseen" not in sentence and "Traceback" not in said.err
        return sentence

    return call


STORE = ("--store", "store.db", "--passphrase-file", "phrase")


@pytest.mark.parametrize(
    "command",
    [
        ["convert"],
        ["convert", "folder", "--adapter"],
        ["verify"],
        ["plan"],
        ["bench"],
        ["ask", "Q", "--model"],
        ["eval", "--dataset", "csv=q.csv", "--predictions"],
        ["judge", "--judge", "x"],
        ["judge", "q.csv", "--estimate", "--instruction"],
        ["judge", "q.csv", "--gguf"],
        ["pareto"],
        ["data", "check", "slake="],
        ["data", "check", "llava="],
        ["data", "fetch-pmc", "--out", "new"],
        ["finetune", "vqa", "--config"],
        ["cases", "list", "--passphrase-file", "phrase", "--store"],
        ["cases", "restore"],
        ["audit", "verify", "--passphrase-file", "phrase", "--store"],
    ],
    ids=" ".join,
)
def test_links_lead_nowhere(places: Path, command: list[str], fail: Fail) -> None:
    for name, found in (("circle", CIRCLE), ("nowhere", NOWHERE), ("circle/x", CIRCLE)):
        arguments = [*command[:-1], command[-1] + name] if command[-1].endswith("=") else [*command, name]
        assert found in fail(*arguments)


@pytest.mark.parametrize(
    "command", [["verify"], ["plan"], ["bench"], ["ask", "Q", "--model"], ["eval", "--dataset", "csv=q.csv"]], ids=" ".join
)
def test_a_converted_model_is_a_folder(places: Path, command: list[str], fail: Fail) -> None:
    assert fail(*command, "noise") == "Error: Expected a converted model's folder at noise, found a file."


@pytest.mark.parametrize(
    ("command", "found"),
    [
        (["eval", "--dataset", "csv=q.csv", "--predictions", "folder"], FOLDER),
        (["eval", "--dataset", "slake=noise"], FILE),
        (["data", "check", "pathvqa=noise"], FILE),
        (["data", "fetch-pmc", "folder", "--out", "new"], FOLDER),
        (["data", "fetch-pmc", "urls", "--out", "noise"], FILE),
        (["data", "fetch-pmc", "urls", "--out", "noise/new"], "Expected a folder at noise, found a file"),
        (["data", "pull", "me/x", "--out", "noise"], FILE),
        (["bench", "--save", "folder.json"], FOLDER),
        (["bench", "--save", "noise/x.json"], FILE),
        (["judge", "folder", "--judge", "x"], FOLDER),
        (["judge", "q.csv", "--gguf", "folder"], FOLDER),
        (["pareto", "folder"], FOLDER),
        (["pareto", "q.csv", "--published", "folder"], FOLDER),
        (["finetune", "vqa", "--config", "folder"], FOLDER),
        (["cases", "list", "--store", "folder", "--passphrase-file", "phrase"], FOLDER),
        (["cases", "restore", "folder", *STORE], FOLDER),
        (["cases", "export", "1", "--to", "noise", *STORE], FILE),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_folder_and_a_file_are_told_apart(places: Path, command: list[str], found: str, fail: Fail) -> None:
    assert found in fail(*command)
    assert not (places / "new").exists()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["judge", "deep", "--judge", "x"], "Expected JSON in line 1 of deep"),
        (["pareto", "deep"], "Expected a JSON document in deep"),
        (["eval", "--dataset", "csv=q.csv", "--predictions", "deep"], "Expected a JSON object in line 1"),
        (["data", "check", "llava=deep"], "Expected JSON in deep"),
        (["data", "fetch-pmc", "deep", "--out", "new"], "Expected figures to fetch in deep"),
        (["plan", "model"], "Expected JSON in model/manifest.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_brackets_within_brackets(places: Path, command: list[str], says: str, fail: Fail) -> None:
    (places / "model").mkdir()
    shutil.copy(places / "deep", places / "model" / "manifest.json")
    assert says in fail(*command)


def test_an_output_that_cannot_be_a_folder_is_left_as_it_is(places: Path, fail: Fail) -> None:
    before = (places / "noise").read_bytes()
    for out in ("noise", "circle", "nowhere", "noise/x", "circle/x"):
        assert "found" in fail("data", "fetch-pmc", "urls", "--out", out)
        assert "found" in fail("data", "pull", "me/x", "--out", out)
    assert (places / "noise").read_bytes() == before and sorted(p.name for p in places.glob(".*")) == []
