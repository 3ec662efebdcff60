"""`edgemed finetune` from the command line: what it says on the way, Ctrl-C, several processes, and a model from parts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgemed import finetune
from edgemed.cli import errors
from edgemed.cli.app import app
from edgemed.cli.finetune import describe
from edgemed.cli.output import Output
from edgemed.finetune import Progress, StageInterrupted


def fake_stage(monkeypatch: pytest.MonkeyPatch, steps: int, error: BaseException | None = None) -> None:
    def run(stage: str, config: Path, report: Any, prepare: Any) -> Path:
        for step in range(1, steps + 1):
            report(Progress(step, steps, 1.5, 12.0, 3723.0, 2_500_000_000))
        if error is not None:
            raise error
        return config.with_suffix("")

    monkeypatch.setattr(finetune, "run_stage", run)


def test_progress_is_a_line_a_twentieth_and_the_result_one_json_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_stage(monkeypatch, 200)
    done = CliRunner().invoke(app, ["finetune", "vqa", "--config", str(tmp_path / "run.toml"), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout) == {"stage": "vqa", "checkpoint": str(tmp_path / "run")}
    notes = [line for line in done.stderr.splitlines() if "/200" in line]
    assert len(notes) == 21 and notes[-1] == "200/200 loss 1.5 · 12 samples/s · 1:02:03 left · 2.50 GB"


def test_ctrl_c_says_where_it_was_saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake_stage(monkeypatch, 3, StageInterrupted(3, 20))
    done = CliRunner().invoke(app, ["finetune", "align", "--config", str(tmp_path / "run.toml")])
    assert "Saved at step 3 of 20. The same command goes on from there." in done.stderr
    assert done.exit_code == 130
    assert errors.report_error(StageInterrupted(3, 20)) == 130


def test_the_first_of_several_processes_speaks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake_stage(monkeypatch, 3)
    monkeypatch.setenv("RANK", "1")
    done = CliRunner().invoke(app, ["finetune", "instruct", "--config", str(tmp_path / "run.toml"), "--json"])
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_a_line_of_progress() -> None:
    assert describe(Progress(1, 2, 0.123456, 0.5, 59.6, 0)) == "loss 0.1235 · 0.5 samples/s · 1:00 left"


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Output().steps() as show:
        show(3, 10, "loss 2")
    assert "3/10" in capsys.readouterr().err


def test_new_writes_a_model(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="fine-tuning needs the train extra")
    from tests.checkpoints import make_parts, save_json, save_tower, save_weights
    from tests.tokenizers_fixture import save_tokenizer

    parts = make_parts("qwen2", "siglip", save_tokenizer(tmp_path / "llm", "qwen2"))
    save_weights(tmp_path / "llm", parts.llm)
    save_json(tmp_path / "llm" / "config.json", parts.text_config.to_dict() | {"architectures": ["Qwen2ForCausalLM"]})
    save_tower(tmp_path / "tower", parts)
    command = ["finetune", "new", "--llm", str(tmp_path / "llm"), "--tower", str(tmp_path / "tower"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == {"checkpoint": str(tmp_path / "out")}
    assert (tmp_path / "out" / "edgemed.json").is_file()
