"""How the Makefile comes to the options that llama-cpp-python is built with."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from runtimes import native

ROOT = Path(__file__).resolve().parents[1]
PORTABLE = "-DGGML_NATIVE=OFF"
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def options(venv: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a recipe of the Makefile sees as CMAKE_ARGS."""
    plain = {k: v for k, v in os.environ.items() if k not in ("CPU", "CMAKE_ARGS", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES")}
    command = ["make", "--no-print-directory", "--eval", 'shown: ; @printf %s "$$CMAKE_ARGS"', "shown", f"VENV={venv}", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**plain, **environment}, capture_output=True, text=True, check=False)


def test_portable_at_first_then_what_is_installed(tmp_path: Path) -> None:
    assert options(tmp_path).stdout == PORTABLE
    (tmp_path / ".cmake-args").write_text("-DGGML_CUDA=ON -DCMAKE_CXX_FLAGS='-O3 -g'\n")
    assert options(tmp_path).stdout == "-DGGML_CUDA=ON -DCMAKE_CXX_FLAGS='-O3 -g'"
    assert options(tmp_path, "CPU=portable").stdout == PORTABLE
    assert options(tmp_path, CMAKE_ARGS="-DA=1").stdout == "-DA=1"
    (tmp_path / ".cmake-args").write_text("")
    assert options(tmp_path, CMAKE_ARGS="").stdout == PORTABLE


@pytest.mark.skipif(not native.CPUINFO.is_file(), reason="no /proc/cpuinfo here")
def test_native_is_what_the_processor_has(tmp_path: Path) -> None:
    expected = native.build_options(native.CPUINFO.read_text(), native.compiler_knows)
    assert options(tmp_path, "CPU=native").stdout.split() == expected


def test_what_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    assert options(tmp_path, CPU="x86_64").stdout == PORTABLE, "some systems name the processor there"
    for arguments, environment, said in ((["CPU=fast"], {}, "found CPU=fast"), (["CPU=native"], {"CMAKE_ARGS": "-DA=1"}, "found both")):
        done = options(tmp_path, *arguments, **environment)
        assert done.returncode != 0 and said in done.stderr
