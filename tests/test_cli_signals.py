"""SIGTERM and SIGHUP end a command as Ctrl-C does: in one sentence, and nothing half-written stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_checkpoint

pytestmark = pytest.mark.skipif(os.name != "posix", reason="SIGHUP")
ROOT = Path(__file__).resolve().parents[1]
# The command line, with a conversion that says when it has begun to write and then takes its time.
SLOW = """
import sys, time
import converters.convert
from edgemed.cli import main

def write(path, *arguments, **options):
    path.write_bytes(b"the beginning")
    print("writing", flush=True)
    time.sleep(60)

converters.convert.write_gguf = write
main()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("source"), "hf", "llama", "siglip").source


def begin(checkpoint: Path, out: Path, ignored: signal.Signals | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW, "convert", str(checkpoint), "--out", str(out), "--quiet"]
    ignore = None if ignored is None else lambda: signal.signal(ignored, signal.SIG_IGN)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=ignore)
    assert process.stdout is not None and process.stdout.readline() == "writing\n"
    assert list(out.rglob("*.gguf"))
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_conversion_that_is_ended_leaves_nothing(checkpoint: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = begin(checkpoint, tmp_path / "new" / "out")
    process.send_signal(number)
    process.send_signal(number)  # shell and system tell of a terminal that went away
    _, told = process.communicate(timeout=30)
    assert process.returncode == 128 + number and told.splitlines() == [f"Ended from outside ({number.name})."]
    assert not (tmp_path / "new").exists()


def test_under_nohup_a_terminal_may_go_away(checkpoint: Path, tmp_path: Path) -> None:
    process = begin(checkpoint, tmp_path / "out", ignored=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM and not (tmp_path / "out").exists()
    process.communicate()
