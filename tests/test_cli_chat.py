"""`edgemed chat` before its screens: what is refused in a sentence, and how it finds, fits and opens a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgemed.cli import chat, run
from edgemed.core.errors import InputError, MissingExtraError


def test_without_a_terminal_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--fake"]) == 1
    said = capsys.readouterr()
    assert "Expected a terminal" in said.err and "edgemed ask" in said.err and said.out == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--theme", "pink"], "Expected --theme dark, light, contrast, found 'pink'"),
        (["--language", "xx"], "Expected a language among"),
        (["--watch", "/no/such/folder"], "Expected a folder to watch"),
        (["/no/such/model"], "Expected a converted model"),
    ],
)
def test_wrong_options_are_refused_before_a_screen_opens(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "check_terminal", lambda: None)
    monkeypatch.setattr("edgemed.clinic.store.harden_process", lambda: True)
    monkeypatch.setattr("edgemed.tui.app.build_app", lambda *_: pytest.fail("a screen was opened"))
    assert run(["chat", *arguments]) == 1
    said = capsys.readouterr().err
    assert says in said and said.count("Error:") == 1


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="not installed") as raised:
        chat.check_packages()
    assert "edgemed[clinic]" in raised.value.hint


def test_no_model_is_no_error(tmp_path: Path) -> None:
    models = chat.ScreenModels(None, None, None)
    assert models.find() is None and models.name == "edgemed-demo"


def test_a_conversion_shows_its_progress_and_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    out = chat.ScreenOutput(quiet=True, show=lambda done, total: seen.append((done, total)))
    out.note("a note")
    out.warn("a warning")
    with out.progress() as bar:
        bar("convert", 1, 2)
    said = capsys.readouterr()
    assert seen == [(1, 2)] and said.out == said.err == ""


def test_help_hides_the_fake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["chat", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--watch" in said and "--fake" not in said


def test_a_language_is_one_of_ours() -> None:
    assert chat.check_language("pt_BR") == "pt" and chat.check_language("") == ""
    with pytest.raises(InputError):
        chat.check_language("klingon")
