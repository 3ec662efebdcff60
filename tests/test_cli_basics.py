"""The command line's manners: exit codes, one sentence and a hint, JSON last, nothing half-said."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from edgemed.cli import options, run
from edgemed.cli.errors import describe_error, report_error
from edgemed.cli.output import Output
from edgemed.core.errors import EdgemedError, InputError
from edgemed.core.text import printable


@pytest.fixture
def out_err(capfd: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    return capfd


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in ("demo", "models", "finetune", "convert", "verify", "ask", "bench", "eval"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("edgemed ")


@pytest.mark.parametrize("arguments", [["nonsense"], ["ask"], ["convert", "--bits", "four"], ["ask", "Q", "--max-tokens", "0"], ["serve"]])
def test_usage_errors_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err


MISSING = [
    ["convert", "/no/such/folder"],
    ["convert", "nosuchname"],
    ["verify", "/no/such/folder"],
    ["ask", "Q", "--model", "/no/such/folder"],
    ["bench", "/no/such/folder"],
    ["eval", "/no/such/folder", "--dataset", "slake=/no/such"],
    ["judge", "/no/such/questions.jsonl", "/no/such/answers.jsonl", "--judge", "m"],
    ["pareto", "/no/such/results.json"],
    ["finetune", "vqa", "--config", "/no/such/run.toml"],
    ["models", "show", "nosuchname"],
    ["models", "pull", "nosuchname"],
    ["models", "verify", "nosuchname"],
]


@pytest.mark.parametrize("arguments", MISSING, ids=" ".join)
def test_what_is_not_there_is_one_sentence_and_exit_1(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 1
    said = capsys.readouterr()
    lines = said.err.splitlines()
    assert said.out == "" and len(lines) == 2 and lines[0].startswith("Error: ") and lines[1].startswith("Hint: ")
    assert "Something unforeseen" not in said.err


@pytest.mark.parametrize("name", [name for name, one in vars(options).items() if "Path" in str(getattr(one, "__args__", ""))])
def test_every_path_refuses_an_empty_text(name: str) -> None:
    (info,) = vars(options)[name].__metadata__
    assert info.parser is not None and info.parser("a/b") == Path("a/b")
    with pytest.raises(InputError, match="found an empty text"):
        info.parser("")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["convert", ""], "SOURCE"),
        (["plan", ""], "DIR"),
        (["bench", ".", ""], "DIR"),
        (["ask", "What?", "--image="], "--image"),
        (["convert", "--out", ""], "--out"),
        (["pareto", "a.json", ""], "RESULTS"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 1
    assert capsys.readouterr().err.splitlines()[0] == f"Error: Expected a path for {name}, found an empty text."


@pytest.mark.parametrize("arguments", [["demo"], ["convert"], ["verify"], ["ask", "Q"], ["bench"]], ids=" ".join)
def test_the_embedded_model_must_be_pulled_first(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 1
    assert "Hint: Run: edgemed models pull edgemed-demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convert", "--bits", "3"], "--bits 4, 8 or 16, found 3"),
        (["convert", "--quant", "Q9"], "found 'Q9'"),
        (["convert", "--samples", "64"], "Expected --calibrate with --samples"),
        (["convert", "--budget", "90MB"], "Expected --calibrate with --budget"),
        (["convert", "--to", "hf", "--samples", "64"], "Expected no --samples with --to hf"),
        (["bench", "--device", "toaster"], "found 'toaster'"),
        (["eval", "--dataset", "slake"], "NAME=PATH"),
        (["models", "pull", "med-moe-phi2-3.6b"], "mixture architecture"),
        (["convert", "med-moe-phi2-3.6b"], "mixture architecture"),
    ],
    ids=lambda v: v if isinstance(v, str) else " ".join(v),
)
def test_wrong_values_are_told(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) == 1
    assert says in capsys.readouterr().err


def test_json_is_the_last_line_and_the_only_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "list", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    models = json.loads(lines[0])["models"]
    assert {m["name"] for m in models} >= {"edgemed-demo"} and all(m["state"] for m in models)


def test_models_show_and_verify(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models", "show", "llava-med-q4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "llava-med-v1.5-mistral-7b"
    assert run(["models", "verify", "tinyllava-1.5b"]) == 0
    assert "not on this machine" in capsys.readouterr().out


def test_a_traceback_shows_only_when_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    error = EdgemedError("Expected a, found b.", "Do c.")
    assert report_error(error) == 1
    assert capsys.readouterr().err == "Error: Expected a, found b.\nHint: Do c.\n"
    monkeypatch.setenv("EDGEMED_DEBUG", "1")
    report_error(error)
    assert "EdgemedError: Expected a" in capsys.readouterr().err


def test_the_unforeseen_is_still_one_sentence() -> None:
    message, hint = describe_error(ValueError("two\nlines"))
    assert message == "Something unforeseen happened (ValueError: two lines)." and "EDGEMED_DEBUG=1" in hint


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(path: Path | None = None) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgemed.core.registry.load_registry", interrupted)
    assert run(["models", "list"]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    out = Output(quiet=True)
    out.note("note")
    out.warn("warning")
    out.text("data")
    said = capsys.readouterr()
    assert said.out == "data\n" and said.err == "Warning: warning\n"


def test_odd_bytes_in_a_path_are_spelled_out(capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("/models/\udcff")
    Output().text(str(path))
    Output(json=True).result({"path": path})
    text, line = capsys.readouterr().out.splitlines()
    assert text == r"/models/\udcff" and json.loads(line) == {"path": str(path)}


def test_only_a_plain_conversion_takes_the_registered_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def stop(*arguments: object, plain_bits: bool, **options: object) -> None:
        seen.append(plain_bits)
        raise EdgemedError("Expected a, found b.")

    monkeypatch.setattr("edgemed.cli.convert.convert_source", stop)
    for arguments in ([], ["--bits", "8"], ["--adapter", "x"], ["--template", "v1"], ["--quant", "Q8_0"], ["--vision-quant", "F16"]):
        assert run(["convert", *arguments]) == 1
    assert seen == [True, True, False, False, False, False]


def test_a_model_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Output().text("\x1b[31mred\x07 \x9b2J é\t\n")
    assert capsys.readouterr().out == "[31mred 2J é\t\n\n"
    assert printable("Ödem · 中") == "Ödem · 中"


def test_a_full_disk_behind_stdout_is_no_riddle() -> None:
    message, _ = describe_error(OSError(errno.ENOSPC, "No space left on device"))
    assert message == "The disk is full where the output goes."


def test_what_the_system_refuses_is_told_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "n" * 300
    for arguments in (["plan", long], ["ask", "Q", "--image", long], ["convert", long], ["cases", "list", "--store", f"{tmp_path}/{long}"]):
        assert run(arguments) == 1
        said = capsys.readouterr().err
        assert "unforeseen" not in said and said.startswith("Error: "), (arguments, said)


def test_a_private_folder_is_told_in_a_sentence() -> None:
    message, hint = describe_error(PermissionError(13, "Permission denied", "/root/x.png"))
    assert message == "Reading or writing /root/x.png is not permitted for this account." and hint
