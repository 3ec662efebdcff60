"""What goes wrong on a person's machine, through the command line: one sentence, a hint, exit code 1, nothing half-written.

Complements test_cli_commands (paths, unreadable images, long questions, a byte less) and test_converters_readers_refusals (broken
checkpoints): files of another model, noise and wrong hashes; a huge image; a full disk; SIGKILL of a conversion and of the engine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
from checkpoints import Reference, hf_names, make_checkpoint, make_parts, save_mmproj_gguf, save_weights
from PIL import Image
from test_core_images import header_only_png

from converters.convert import convert
from converters.readers import open_checkpoint
from converters.recipes import Recipe
from edgemed.cli import run
from edgemed.core.manifest import Artifact, load_artifact

ROOT = Path(__file__).resolve().parents[1]
EDGEMED = (sys.executable, "-m", "edgemed")
Fail = Callable[..., str]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_checkpoint(tmp_path_factory.mktemp("source"), "hf", "llama", "siglip")


@pytest.fixture(scope="module")
def converted(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(open_checkpoint(reference.source), tmp_path_factory.mktemp("converted"), Recipe.of(bits=16)).folder


@pytest.fixture
def artifact(converted: Path, tmp_path: Path) -> Artifact:
    return load_artifact(Path(shutil.copytree(converted, tmp_path / "model")))


@pytest.fixture
def fail(capsys: pytest.CaptureFixture[str]) -> Iterator[Fail]:
    """Run a command that must fail in the agreed form; its sentence."""

    def call(*arguments: object) -> str:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        return agreed(code, capsys.readouterr().err)

    yield call


def agreed(code: int, err: str) -> str:
    """The sentence on stderr, which is followed by a hint."""
    assert code == 1 and "Traceback" not in err and "Something unforeseen" not in err, err
    *_, sentence, hint = err.splitlines()
    assert err.count("Error: ") == 1 and sentence.startswith("Error: ") and hint.startswith("Hint: "), err
    return sentence


def record(artifact: Artifact, path: Path, data: bytes) -> None:
    """Put `data` in a file's place and into the manifest, as if it belonged there."""
    path.write_bytes(data)
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    manifest["files"][path.name] = {"size_bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (artifact.folder / "manifest.json").write_text(json.dumps(manifest))


# ---------------------------------------------------------------- converted folders


@pytest.mark.parametrize("command", [["verify"], ["ask", "Q", "--model"]], ids=lambda c: c[0])
def test_another_models_mmproj(artifact: Artifact, tmp_path: Path, command: list[str], fail: Fail) -> None:
    other = make_parts("llama", "siglip", 480, seed=9)
    save_mmproj_gguf(tmp_path / "other.gguf", other)
    swapped = (tmp_path / "other.gguf").read_bytes()
    size = artifact.mmproj_path.stat().st_size
    artifact.mmproj_path.write_bytes(swapped.ljust(size, b"\0")[:size])
    assert "SHA-256" in fail(*command, artifact.folder)
    record(artifact, artifact.mmproj_path, swapped)
    assert "the vision tower to agree with the manifest's probe" in fail(*command, artifact.folder)
    narrow = make_parts("llama", "siglip", 480, text={"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1})
    save_mmproj_gguf(tmp_path / "narrow.gguf", narrow)
    record(artifact, artifact.mmproj_path, (tmp_path / "narrow.gguf").read_bytes())
    assert "Expected" in fail(*command, artifact.folder)


@pytest.mark.parametrize("which", ["llm_path", "mmproj_path"])
def test_noise_in_a_files_place(artifact: Artifact, which: str, fail: Fail) -> None:
    path: Path = getattr(artifact, which)
    noise = np.random.default_rng(0).bytes(path.stat().st_size)
    for data in (noise, path.read_bytes()[:4000] + noise[4000:]):
        path.write_bytes(data)
        said = fail("ask", "Q", "--model", artifact.folder)  # a plan reads the headers before the hashes are checked
        assert path.name in said and "Expected a GGUF model" in said or "SHA-256" in said
        assert "SHA-256" in fail("verify", artifact.folder)
    for data in (noise, b"GGUF\x03\0\0\0" + noise[8:]):
        record(artifact, path, data)
        assert path.name in fail("ask", "Q", "--model", artifact.folder)


def test_a_wrong_hash_in_the_manifest(artifact: Artifact, fail: Fail) -> None:
    manifest = json.loads((artifact.folder / "manifest.json").read_text())
    manifest["files"][artifact.llm_path.name]["sha256"] = "0" * 64
    (artifact.folder / "manifest.json").write_text(json.dumps(manifest))
    for command in (["verify"], ["ask", "Q", "--model"], ["bench"]):
        assert "SHA-256 000000000000" in fail(*command, artifact.folder)


# ---------------------------------------------------------------- checkpoints


def test_bad_checkpoints_leave_no_output(reference: Reference, tmp_path: Path, fail: Fail) -> None:
    source = Path(shutil.copytree(reference.source, tmp_path / "source"))
    (source / "model.safetensors").unlink()
    save_weights(source, hf_names(reference.parts, "4"), shards=3)
    last = source / "model-00003-of-00003.safetensors"
    whole, config = last.read_bytes(), (source / "config.json").read_text()
    out = tmp_path / "out"

    def told(words: str) -> None:
        assert words in fail("convert", source, "--out", out) and not out.exists()

    last.write_bytes(whole[:-1])
    told("found a file of")
    last.unlink()
    told("00003-of-00003")
    last.write_bytes(whole)
    (source / "config.json").write_text(config.replace('"intermediate_size": 128', '"intermediate_size": 96'))
    told("shape [96, 64]")
    (source / "config.json").write_text(config.replace("LlavaForConditionalGeneration", "GPT2LMHeadModel"))
    told("GPT2LMHeadModel")


def test_gguf_sources_swapped_with_each_other(tmp_path: Path, fail: Fail) -> None:
    source = make_checkpoint(tmp_path / "source", "gguf", "llama", "siglip")
    options = ["--template", "v1", "--image-mode", "pad", "--out", tmp_path / "out"]
    assert "llm.gguf" in fail("convert", source.source, "--mmproj", source.source, *options)
    assert "mmproj.gguf" in fail("convert", source.options["mmproj"], "--mmproj", source.source, *options)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- images


def test_a_huge_image_is_refused_before_decoding(artifact: Artifact, tmp_path: Path, fail: Fail) -> None:
    (tmp_path / "bomb.png").write_bytes(header_only_png(30_000, 30_000))
    assert "megapixels" in fail("ask", "Q", "--image", tmp_path / "bomb.png", "--model", artifact.folder)


def test_odd_images_are_answered(artifact: Artifact, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 65536, (30, 40), np.uint16)).save(tmp_path / "grey16.png")
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg")
    colour.quantize(16).save(tmp_path / "palette.png", transparency=3)
    colour.save(tmp_path / "rotated.jpg", exif=exif)
    colour.save(tmp_path / "animated.gif", save_all=True, append_images=[colour.rotate(90)])
    Image.new("RGB", (3000, 2)).save(tmp_path / "wide.png")
    Image.new("L", (2, 3000)).save(tmp_path / "tall.png")
    files = [x for path in sorted(tmp_path.iterdir()) if path.is_file() for x in ("--image", str(path))]
    assert len(files) == 14
    assert run(["ask", "Q", *files, "--model", str(artifact.folder), "--max-tokens", "2", "--quiet"]) == 0


# ---------------------------------------------------------------- the machine


def mount(kind: str, folder: Path) -> list[str]:
    """A command prefix under which a small file system lies at `folder`; a skip where the system allows none."""
    prefix = [
        "unshare",
        "--user",
        "--map-root-user",
        "--mount",
        "sh",
        "-c",
        f'mount -t tmpfs -o {kind} tmpfs "$0" && exec "$@"',
        str(folder),
    ]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("mounting a file system is not permitted here")
    return prefix


@pytest.mark.parametrize(("kind", "says"), [("size=1m", "free disk space"), ("size=64m,nr_inodes=5", "disk is full")])
def test_a_full_disk(reference: Reference, tmp_path: Path, kind: str, says: str) -> None:
    """Too small to begin with; and full in the middle: of five inodes, folders and the first file take all."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = " ".join(['"$@"; code=$?; find "$0" -type f >&2; exit $code'])
    arguments = [*EDGEMED, "convert", str(reference.source), "--out", str(disk / "a" / "model"), "--no-verify", "--quiet"]
    done = subprocess.run([*mount(kind, disk), "sh", "-c", command, str(disk), *arguments], capture_output=True, text=True, cwd=ROOT)
    assert says in agreed(done.returncode, done.stderr)  # and the list of files behind it is empty


KILLER = """
import os, random, signal, sys, time
from pathlib import Path
from converters.convert import convert
from edgemed.cli import run
from edgemed.cli.compose import require_artifact
from edgemed.cli.output import Output
from edgemed.core.errors import ArtifactError
from edgemed.core.manifest import verify_files

source, root = sys.argv[1], Path(sys.argv[2])
rng = random.Random(0)

def go(bits, out):
    return run(["convert", source, "--bits", str(bits), "--out", str(out), "--no-verify", "--quiet", "--json"])

assert go(8, root / "warm") == 0
begun = time.monotonic()
assert go(8, root / "warm") == 0
took = time.monotonic() - begun
for i in range(20):
    out = root / ("once" if i >= 10 else str(i))  # ten times nothing is there before
    child = os.fork()
    if child == 0:
        while True:  # anew and anew, each time of other bits, so that the moments fall on all of a conversion
            assert go(4, out) == go(8, out) == 0
    time.sleep(rng.uniform(0.3, 3) * took)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    try:
        verify_files(require_artifact(out, Output()), use_cache=False)  # as `ask` and `verify` open it
        whole = 3
    except ArtifactError as error:
        assert "manifest.json" in error.message or "no such folder" in error.message, error
        whole = 0
    seen = [p.name for p in out.iterdir() if not p.name.startswith(".convert.")] if out.exists() else []
    assert len(seen) == whole, seen
for out in root.iterdir():
    assert go(8, out) == 0
    assert len(list(out.iterdir())) == 3, list(out.iterdir())
"""


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_sigkill_of_a_conversion_at_20_moments(reference: Reference, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, str(reference.source), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def kill_while_answering(arguments: list[str]) -> tuple[int, str]:
    """Ask in a process of its own and kill its engine at the first character; its exit code and stderr."""
    command = [*EDGEMED, "ask", "Tell me all.", "--max-tokens", "900", "--temperature", "2", *arguments]
    process: subprocess.Popen[bytes] = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stdout is not None
    workers: list[psutil.Process] = []
    while not workers and process.poll() is None:
        with suppress(psutil.Error):  # a child that is just starting
            workers = [c for c in psutil.Process(process.pid).children() if "runtimes.worker" in " ".join(c.cmdline())]
    process.stdout.read(1)
    with suppress(psutil.NoSuchProcess):
        workers[0].send_signal(signal.SIGKILL)
    _, err = process.communicate()
    return process.returncode, err.decode()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_sigkill_of_the_engine_in_an_answer(artifact: Artifact) -> None:
    arguments = ["--model", str(artifact.folder), "--quiet"]
    for seed in range(5):  # an answer of 400 tokens can end before the kill on a busy machine
        code, err = kill_while_answering([*arguments, "--seed", str(seed)])
        if code:
            break
    assert "SIGKILL" in agreed(code, err)
    assert run(["ask", "And now?", "--max-tokens", "3", *arguments]) == 0
