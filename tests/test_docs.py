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
PROSE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/finetuning.md")]


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


def test_recipes_in_the_guide_are_valid_and_name_data_sets_that_exist(tmp_path: Path) -> None:
    from edgemed.core.contract import Contract, save_contract
    from edgemed.core.conversation import find_template
    from edgemed.core.images import ImagePreparation
    from edgemed.data import READERS
    from edgemed.finetune.recipe import load_recipe

    guide = (ROOT / "docs" / "finetuning.md").read_text()
    image = ImagePreparation(size_px=224, mode="pad", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    for folder in ("start", "aligned", "instructed"):
        (tmp_path / folder).mkdir()
        save_contract(tmp_path / folder, Contract(image=image, template=find_template("chatml")))
    stages = ("vqa", "align", "instruct", "vqa")
    texts = re.findall(r"```toml\n(.*?)```", guide, re.S)
    assert len(texts) == len(stages)
    for stage, text in zip(stages, texts, strict=True):
        (tmp_path / "run.toml").write_text(text)
        recipe = load_recipe(stage, tmp_path / "run.toml")
        assert {data.name for data in recipe.data} <= set(READERS)
    assert all(f"`{name}`" in guide for name in READERS)


def test_every_key_of_a_recipe_is_explained() -> None:
    from edgemed.finetune.recipe import Recipe

    page = (ROOT / "docs" / "recipes.md").read_text()
    for name, field in Recipe.model_fields.items():
        assert name == "stage" or f"| `{name}` | " in page or f"[{name}]" in page, name
        for table in (t for t in (field.annotation, *getattr(field.annotation, "__args__", ())) if hasattr(t, "model_fields")):
            assert all(f"| `{key}` | " in page for key in table.model_fields), name
