"""Documentation that cannot drift: generated pages equal what would be written, every command is mentioned, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from edgemed.cli.app import app
from edgemed.cli.docs import PAGES, main, stale_pages

ROOT = Path(__file__).resolve().parents[1]
PROSE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]


def test_generated_pages_are_up_to_date() -> None:
    assert stale_pages() == [], "run: make docs"


def test_a_stale_page_is_found(tmp_path: Path) -> None:
    assert stale_pages(tmp_path) == list(PAGES)


def test_check_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("edgemed.cli.docs.stale_pages", lambda: ["cli.md"])
    assert main(["--check"]) == 1
    assert "make docs" in capsys.readouterr().err


def commands(command: Any, path: str) -> list[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    return [(path, command)] if children is None else [c for name, child in children.items() for c in commands(child, f"{path} {name}")]


ALL = commands(typer.main.get_command(app), "edgemed")


@pytest.mark.parametrize(("name", "command"), ALL, ids=[name for name, _ in ALL])
def test_every_command_and_option_has_help(name: str, command: Any) -> None:
    assert command.help and command.help.strip().endswith(".")
    assert [p.name for p in command.params if not p.help] == []


@pytest.mark.parametrize("name", [name for name, _ in ALL])
def test_every_command_is_in_the_reference(name: str) -> None:
    assert f"## {name}\n" in (ROOT / "docs" / "cli.md").read_text()


def test_commands_in_the_prose_exist() -> None:
    known = {tuple(name.split()) for name, _ in ALL}
    for page in PROSE:
        for words in re.findall(
            r"edgemed ((?:models|finetune) [a-z]+|[a-z]+)(?=[ `\n])",
            "\n".join(re.findall(r"`[^`]+`|^    .*$|```.*?```", page.read_text(), re.S | re.M)),
        ):
            path = ("edgemed", *words.split())
            assert path in known or (path[1],) == ("models",) or path[:2] in {k[:2] for k in known}, f"{page.name}: {' '.join(path)}"


@pytest.mark.parametrize("page", [*PROSE, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
