"""A whole conversion: complete or not there, whatever interrupts it."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from tiny_checkpoint import tiny_checkpoint, tiny_llm

from converters import staging
from converters.convert import convert
from converters.recipes import Recipe
from converters.tensors import ArrayTensor
from edgemed.core.errors import ArtifactError, CheckpointError, InputError, ResourceError
from edgemed.core.files import sha256_file
from edgemed.core.manifest import FileRecord, load_artifact, verify_files

Q8 = Recipe.of(bits=8)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_artifact_is_complete(tmp_path):
    seen = []
    artifact = convert(
        tiny_checkpoint("clip"), tmp_path / "a" / "b", Recipe.of(bits=4), progress=lambda done, total: seen.append((done, total))
    )
    manifest = artifact.manifest
    assert names(artifact.folder) == ["manifest.json", "mmproj-tiny-model-IQ4_NL.gguf", "tiny-model-IQ4_NL.gguf"]
    verify_files(artifact, use_cache=False)
    assert seen[0][0] == 0 and all(a <= b for (a, _), (b, _) in zip(seen, seen[1:], strict=False))
    assert 0.97 < seen[-1][0] / seen[-1][1] <= 1  # padding between tensors is not counted as done
    assert manifest.bits == 4 and manifest.recipe == {"bits": "4", "llm": "Q4_K_M", "vision": "Q4_K"}
    assert 4.5 < manifest.llm.bits_per_weight < 7 and manifest.llm.parameters == sum(
        t.shape[0] * (t.shape[1:] or (1,))[0] for t in manifest.tensors if t.file == "llm"
    )
    assert manifest.vision.image_tokens == 36 and manifest.vision.tower == "clip"
    assert manifest.certificate.vision.rows and manifest.template.name == "v1" and manifest.space_prefix == "each"
    assert manifest.tool_versions["gguf"]
    assert {t.source for t in manifest.tensors} >= {"model.embed_tokens.weight", "encoder.layers.0.mlp.fc1.weight + zeros"}


def test_sources_are_hashed(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(b"weights")
    checkpoint = replace(tiny_checkpoint(), path=source, files={"model.safetensors": FileRecord(size_bytes=7, sha256="")})
    record = convert(checkpoint, tmp_path / "out", Q8).manifest.source.files["model.safetensors"]
    assert record == FileRecord(size_bytes=7, sha256=sha256_file(source / "model.safetensors"))
    with pytest.raises(InputError, match="other than the source's"):
        convert(checkpoint, source, Q8)


@pytest.mark.parametrize("bits", [4, 16])
def test_a_tower_that_overflows_is_told_by_its_largest_weight(tmp_path, bits):
    checkpoint = tiny_checkpoint()
    name = "encoder.layers.0.layer_norm1.weight"
    values = checkpoint.tower.tensors[name].array.copy()
    values[0] = 1e38  # a norm stays F32, which holds it
    tensors = {**checkpoint.tower.tensors, name: ArrayTensor(name, values)}
    damaged = replace(checkpoint, tower=replace(checkpoint.tower, tensors=tensors))
    with pytest.raises(CheckpointError, match=f"found an overflow; the largest weight, 1e.38, is in '{name}'"):
        convert(damaged, tmp_path / "out", Recipe.of(bits=bits))
    assert not (tmp_path / "out").exists()


def test_an_artifact_is_replaced_with_its_files(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    convert(tiny_checkpoint(), tmp_path, Q8)
    artifact = convert(tiny_checkpoint(), tmp_path, Recipe.of(bits=16))
    assert names(tmp_path) == ["manifest.json", "mmproj-tiny-model-F16.gguf", "note.txt", "tiny-model-F16.gguf"]
    verify_files(artifact, use_cache=False)


@dataclass(frozen=True)
class Failing:
    """A tensor whose last rows fail to be read."""

    base: object
    error: Exception

    @property
    def name(self):
        return self.base.name

    @property
    def shape(self):
        return self.base.shape

    def read(self, start, stop):
        raise self.error


def failing_checkpoint(error):
    llm = tiny_llm()
    return tiny_checkpoint(llm=replace(llm, tensors={**llm.tensors, "model.norm.weight": Failing(llm.tensors["model.norm.weight"], error)}))


def test_a_failure_leaves_what_was_there(tmp_path):
    before = convert(tiny_checkpoint(), tmp_path / "out", Q8)
    with pytest.raises(CheckpointError, match="broken shard"):
        convert(failing_checkpoint(CheckpointError("Expected a whole file, found a broken shard.")), tmp_path / "out", Recipe.of(bits=16))
    assert load_artifact(before.folder).manifest == before.manifest
    verify_files(before, use_cache=False)
    assert len(names(before.folder)) == 3


def test_a_full_disk_leaves_nothing(tmp_path):
    with pytest.raises(ResourceError, match="disk is full"):
        convert(failing_checkpoint(OSError(errno.ENOSPC, "No space left on device")), tmp_path / "a" / "out", Q8)
    assert names(tmp_path) == []


def test_space_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(ResourceError, match="of free disk space"):
        convert(tiny_checkpoint(), tmp_path / "out", Q8)
    assert names(tmp_path) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match="found a file"):
        convert(tiny_checkpoint(), tmp_path / "out", Q8)


@pytest.mark.skipif(os.name != "posix", reason="locks on folders are POSIX")
def test_two_conversions_into_one_folder(tmp_path):
    with staging.staged(tmp_path), pytest.raises(ResourceError, match="Another conversion"), staging.staged(tmp_path):
        pass
    assert names(tmp_path) == []


def test_an_interrupted_move_is_finished(tmp_path):
    """Killed between the renames: the next conversion's start, or finish_commit, completes it."""
    convert(tiny_checkpoint(), tmp_path / "old", Q8)
    convert(tiny_checkpoint(name="other"), tmp_path / "new", Q8)
    out = tmp_path / "old"
    ready = out / staging.COMMIT_NAME
    ready.mkdir()
    for path in (tmp_path / "new").iterdir():
        path.rename(ready / path.name)
    (ready / "other-Q8_0.gguf").rename(out / "other-Q8_0.gguf")  # one file was moved, then the process died
    staging.finish_commit(out)
    assert names(out) == ["manifest.json", "mmproj-other-Q8_0.gguf", "other-Q8_0.gguf"]
    verify_files(load_artifact(out), use_cache=False)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from tiny_checkpoint import tiny_checkpoint
from converters.convert import convert
from converters.recipes import Recipe
print("ready", flush=True)
for bits in (8, 16) * 1000:
    convert(tiny_checkpoint(), Path(sys.argv[2]), Recipe.of(bits=bits))
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_sigkill_leaves_a_whole_artifact_or_none(tmp_path):
    """Killed at eight moments of a loop that converts over and over: what is there is whole, and the next run cleans up."""
    here = Path(__file__).parent
    for delay in range(8):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(here), str(tmp_path)], stdout=subprocess.PIPE, cwd=here.parent)
        process.stdout.readline()
        time.sleep(0.003 + 0.037 * delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        staging.finish_commit(tmp_path)
        try:
            verify_files(load_artifact(tmp_path), use_cache=False)
        except ArtifactError as error:
            assert "no manifest.json" in error.message
            assert not [n for n in names(tmp_path) if n.endswith(".gguf")]
    convert(tiny_checkpoint(), tmp_path, Q8)
    assert len(names(tmp_path)) == 3
