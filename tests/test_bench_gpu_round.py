"""The round of measurements on a lent GPU: its commands are such as their programs take."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bench import gpu_round, peers
from bench.gpu_round import STEPS, Round


def test_each_step_has_commands_and_leaves_out_models(tmp_path: Path) -> None:
    both = Round(tmp_path, tmp_path, 2, True)
    counts = {name: len(list(step(both))) for name, step in STEPS.items()}
    assert counts == {"make": 6, "med": 1, "tiny": 1, "parity": 1, "planning": 2, "settings": 2, "budget": 1}
    tiny = Round(tmp_path, tmp_path, 2, False, ("tiny",))
    assert [len(list(STEPS[name](tiny))) for name in ("make", "med", "tiny", "planning")] == [3, 0, 1, 1]
    ((dense, _),) = STEPS["med"](both)
    assert gpu_round.DENSE in dense and gpu_round.DENSE not in next(STEPS["med"](replace(both, dense=False)))[0]
    (*_, (last, environment)) = STEPS["tiny"](Round(tmp_path, tmp_path, 2, False, switches=("A=1", "B=2")))
    assert environment == {"B": "2"} and str(tmp_path / "tiny-B=2.json") in last
    (tmp_path / "tiny4").mkdir()
    assert not list(STEPS["make"](tiny)), "what was made is kept"


def test_a_failed_command_is_told_and_the_tables_come_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(r: Round) -> list[gpu_round.Command]:
        words = "import os, sys; print('offline', os.environ['HF_HUB_OFFLINE']); sys.exit(3)"
        return [([sys.executable, "-c", words], {}), ([sys.executable, "-c", "print('good')"], {})]

    monkeypatch.setitem(gpu_round.STEPS, "parity", step)
    round_ = Round(tmp_path, tmp_path, 2, False)
    row = peers.Row("edgemed Q4_K_M {}", encode_s=0.013, prefill_s=0.06, rest_s=0.001, first_token_s=0.074)
    (tmp_path / "med.json").write_text(json.dumps([row.__dict__]))
    (tmp_path / "med-rtx3050.json").write_text("{}")
    assert gpu_round.run(["parity"], round_) == 1
    gpu_round.report(round_)
    out = capsys.readouterr().out
    assert "exit code 3" in out and "offline 1" in out and "good" in out
    assert [part in out[out.index("Beside its peers") :] for part in ("13.0", "60.0", "1.0", "74.0")] == [True] * 4


def test_the_commands_are_taken(tmp_path: Path) -> None:
    for step in ("make", "med", "parity", "planning", "settings"):
        for command, _ in STEPS[step](Round(tmp_path, tmp_path, 2, True, ("med",))):
            if command[1] == "-m":
                done = subprocess.run([*command, "--help"], capture_output=True, text=True)
                assert done.returncode == 0, done.stderr
