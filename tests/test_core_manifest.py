"""manifest.json: what does not match its files, or is not understood, is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from edgemed.core.conversation import TEMPLATES
from edgemed.core.errors import ArtifactError
from edgemed.core.files import sha256_file
from edgemed.core.images import ImagePreparation
from edgemed.core.manifest import (
    Artifact,
    Certificate,
    FileRecord,
    LlmRecord,
    Manifest,
    SourceRecord,
    Summary,
    VisionRecord,
    load_artifact,
    save_manifest,
    verify_files,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("m.gguf", "mmproj-m.gguf"):
        (folder / name).write_bytes(name.encode() * 100)
    save_manifest(folder, manifest(folder))
    return folder


def manifest(folder: Path) -> Manifest:
    files = {p.name: FileRecord(size_bytes=p.stat().st_size, sha256=sha256_file(p)) for p in folder.glob("*.gguf")}
    llm = LlmRecord(
        file="m.gguf", arch="llama", quant="F16", parameters=1, bits_per_weight=16, context_length=64, vocab_size=8, embedding_length=4
    )
    vision = VisionRecord(file="mmproj-m.gguf", tower="siglip", quant="F16", parameters=1, bits_per_weight=16, image_tokens=4)
    return Manifest(
        name="m",
        bits=16,
        created="2026-01-01T00:00:00+00:00",
        tool_versions={},
        source=SourceRecord(reader="hf", path="/x", files={}),
        llm=llm,
        vision=vision,
        files=files,
        image=ImagePreparation(size_px=8, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        template=TEMPLATES["chatml"],
        space_prefix="none",
        recipe={},
        tensors=(),
        certificate=Certificate(probe="p", vision=Summary(rows=((0.1, 0.2),), tolerance=0.1)),
    )


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_it_reads_back_what_was_written(folder: Path) -> None:
    artifact = load_artifact(folder)
    assert artifact == Artifact(folder, manifest(folder))
    assert artifact.llm_path.name == "m.gguf" and artifact.mmproj_path.name == "mmproj-m.gguf"
    verify_files(artifact)


def test_no_folder_and_no_manifest(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none", "no such folder"), (tmp_path, r"no manifest\.json")):
        with pytest.raises(ArtifactError, match=says) as caught:
            load_artifact(path)
        assert "edgemed convert" in caught.value.hint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema_version": 99}, "schema 1 in .* found 99"),
        ({"colour": "blue"}, "colour"),
        ({"bits": "many"}, "bits"),
        ({"template": {}}, "template"),
        ({"files": {}}, "found no record"),
        ({"files": {"../m.gguf": {"size_bytes": 1, "sha256": "0" * 64}}}, "plain file names"),
        ({"files": {"none.gguf": {"size_bytes": 1, "sha256": "0" * 64}}}, "found none"),
    ],
)
def test_what_is_not_understood_is_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    edit(folder, **changes)
    with pytest.raises(ArtifactError, match=says):
        load_artifact(folder)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *(("image.size_px", value) for value in (0, -8, 1 << 30, 8.5)),
        *(
            ("image.mean", value)
            for value in ([0.5, 0.5], [0.5] * 4, [0.5, 0.5, float("nan")], [0.5, 0.5, float("inf")], [0.5, 0.5, 1e300])
        ),
        *(("image.std", value) for value in ([0.5, 0.5], [0.5, 0.5, 0.0], [0.5, 0.5, -0.5], [0.5, 0.5, float("nan")])),
        *(("image.pad_colour", value) for value in ([0, 0, 256], [-1, 0, 0], [0, 0])),
        *(("llm.context_length", value) for value in (0, -1, 1 << 40)),
        *(("llm.vocab_size", value) for value in (-1, "many")),
        *((f"{part}.file", value) for part in ("llm", "vision") for value in ("../m.gguf", "/m.gguf", "x\\m.gguf")),
        *(("vision.image_tokens", value) for value in (0, -4, 1 << 40)),
        *(("vision.bits_per_weight", value) for value in (-1.0, float("nan"))),
        *(("files.m.gguf.sha256", value) for value in ("0", "g" * 64, "0" * 65)),
        ("files.m.gguf.size_bytes", -1),
        *(("certificate.vision.tolerance", value) for value in (0, -1.0, float("nan"), float("inf"))),
        *(("certificate.vision.rows", value) for value in ([], [[0.1, 0.2], [0.1]], [[0.1, float("nan")]], [[1e300, 0.2]])),
        ("template.stop", [""]),
        *(("template.control", value) for value in ([""], ["#"], ["# "], [" #"])),
    ],
)
def test_nonsense_in_a_manifest_is_refused(folder: Path, where: str, value: Any) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    *parents, key = where.replace("m.gguf", "m\0gguf").split(".")
    part = data
    for parent in parents:
        part = part[parent.replace("\0", ".")]
    assert key in part
    part[key] = value
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="Expected a valid manifest .* found 1 problem") as caught:
        load_artifact(folder)
    assert f"first at '{where}" in caught.value.message


def test_a_file_elsewhere_under_the_same_name_is_not_taken(folder: Path) -> None:
    data = json.loads((folder / "manifest.json").read_text())
    data["llm"]["file"] = ".."
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="found no record"):
        load_artifact(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00\xff"])
def test_what_is_no_manifest_is_refused(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ArtifactError):
        load_artifact(folder)


@pytest.mark.parametrize("name", ["m.gguf", "mmproj-m.gguf"])
def test_one_byte_less_is_seen_at_loading(folder: Path, name: str) -> None:
    os.truncate(folder / name, (folder / name).stat().st_size - 1)
    with pytest.raises(ArtifactError, match="bytes in"):
        load_artifact(folder)


def test_other_bytes_of_the_same_size_are_seen_by_the_hash(folder: Path) -> None:
    path = folder / "m.gguf"
    artifact = load_artifact(folder)
    verify_files(artifact)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ArtifactError, match="SHA-256"):
        verify_files(load_artifact(folder))


def test_a_file_is_hashed_once_while_it_stays_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = load_artifact(folder)
    verify_files(artifact)
    hashed: list[Path] = []
    monkeypatch.setattr("edgemed.core.manifest.sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    verify_files(artifact)
    assert hashed == []
    verify_files(artifact, use_cache=False)
    assert len(hashed) == 2


def test_a_home_that_cannot_be_written_only_costs_time(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("EDGEMED_HOME", str(blocked))
    verify_files(load_artifact(folder))
