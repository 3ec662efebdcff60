"""Processes of ours: with our modules, and with nothing of the folder that they are started in."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from edgemed.core.children import own_command, own_environment


def test_a_file_of_the_current_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("psutil", "json", "edgemed"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('run')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep)
    command = own_command("runtimes.dense", "--help")
    done = subprocess.run(command, cwd=tmp_path, env=own_environment(), capture_output=True, text=True, check=True)
    assert "python -m runtimes.dense" in done.stdout and done.stderr == ""
