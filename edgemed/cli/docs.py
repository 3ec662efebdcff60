"""The reference pages that are generated: docs/cli.md from the commands, docs/models.md from models.toml, docs/recipes.md from the recipes.

    python -m edgemed.cli.docs           # write them (make docs)
    python -m edgemed.cli.docs --check   # exit 1 where one is out of date (make test)

Written by hand here instead of with Typer's own generator, whose wording changes with its version.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from edgemed.cli.app import app
from edgemed.core.registry import HubSource, ModelEntry, load_registry
from edgemed.finetune.recipe import (
    STAGES,
    DataRecipe,
    Described,
    FeatureRecipe,
    JoinRecipe,
    LoraRecipe,
    OptimRecipe,
    Recipe,
    stage_defaults,
)

DOCS = Path(__file__).parents[2] / "docs"
_MADE = "<!-- Made by `make docs`; edit its source, not this page. -->\n"


def cli_page() -> str:
    """docs/cli.md."""
    out = [
        "# Command line\n",
        _MADE,
        "Data goes to stdout; progress, warnings and notes to stderr. `--json` makes stdout's last line one JSON document. "
        "A DIR, a SOURCE or `--model` that is left out means edgemed-demo.\n",
        "Exit codes: 0 success, 1 error (one sentence and a hint), 2 usage, 130 interrupted, 143 and 129 ended by SIGTERM and SIGHUP. "
        "`EDGEMED_DEBUG=1` adds a traceback, `EDGEMED_HOME` moves pulled and converted models.\n",
        "The hospital server and offline bundles come with later releases.\n",
    ]
    for path, command in _commands(typer.main.get_command(app), ["edgemed"]):
        out.append(_command_section(" ".join(path), command))
    return "\n".join(out)


def _commands(command: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name, child in children.items():
        yield from _commands(child, [*path, name])


def _command_section(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and "--help" not in p.opts and not p.hidden]
    usage = " ".join([name, *(_argument_name(a) for a in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## {name}\n", f"{(command.help or '').strip()}\n", f"```\n{usage}\n```\n"]
    rows = [(f"`{_argument_name(a)}`", a.help or "") for a in arguments]
    rows += [(f"`{_option_name(o)}`", (o.help or "") + _default(o)) for o in options]
    return "\n".join([*lines, _table(("", ""), rows)])


def _argument_name(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _option_name(option: Any) -> str:
    names = ", ".join(sorted(option.opts, key=len, reverse=True))
    return names if option.is_flag else f"{names} {option.metavar or 'TEXT'}"


def _default(option: Any) -> str:
    return (
        ""
        if option.is_flag or option.default in (None, "", [], ()) or option.required or callable(option.default)
        else f" Default: {option.default}."
    )


def models_page() -> str:
    """docs/models.md."""
    entries = load_registry().model
    out = [
        "# Models\n",
        _MADE,
        "All of them advise only and are not for clinical use. A revision marked *unverified* could not be looked up when it was written: "
        "`edgemed models pull` then takes the main branch and records the commit it got.\n",
    ]
    rows = [(f"[{e.name}](#{e.name.replace('.', '')})", e.role, e.llm, e.tower, e.licence, _artifacts(e)) for e in entries]
    out.append(_table(("name", "role", "language model", "tower", "licence", "artifacts"), rows))
    out += [_model_section(entry) for entry in entries]
    return "\n".join(out)


def _artifacts(entry: ModelEntry) -> str:
    return ", ".join(f"{a.name} ({a.bits} bits)" for a in entry.artifacts) or "not convertible"


def _model_section(entry: ModelEntry) -> str:
    image = entry.image
    numbers = " ".join(f"{v:g}" for v in image.mean), " ".join(f"{v:g}" for v in image.std)
    colour = f", filled with {image.pad_colour}" if image.mode == "pad" else ""
    rows = [
        ("licence", f"{entry.licence}. {entry.licence_note}".removesuffix(". ")),
        ("architecture", f"`{entry.architecture}`"),
        ("language model", entry.llm),
        ("tower, projector", f"{entry.tower}, `{entry.projector}`"),
        ("image preparation", f"{image.mode} to {image.size_px} px{colour}; mean {numbers[0]}, deviation {numbers[1]}"),
        ("conversation template", f"`{entry.template}`"),
    ]
    for part, source in entry.sources.parts().items():
        basis = f" ({source.revision_basis})" if isinstance(source, HubSource) and source.revision_basis else ""
        rows.append((part.replace("_", " "), source.describe() + basis))
    rows.append(("artifacts", _artifacts(entry)))
    rows += [("why not convertible", entry.not_convertible)] if entry.not_convertible else []
    rows += [("note", note) for note in entry.notes]
    return f"## {entry.name}\n\n{_table((entry.title, ''), rows)}"


# A recipe's tables by the heading that TOML has for them.
_TABLES: dict[str, type[Described]] = {
    "": Recipe,
    "[[data]]": DataRecipe,
    "[optim]": OptimRecipe,
    "[lora]": LoraRecipe,
    "[features]": FeatureRecipe,
    "[join]": JoinRecipe,
}
_IMAGE = """## [image]

How images are prepared; left out, it is that of `model`, where edgemed wrote it.

| key | left out | |
|---|---|---|
| `size_px` | needed | The side, as the tower has it. |
| `mode` | needed | `pad` to a square, `stretch`, or `crop` the middle. |
| `pad_colour` | `[0, 0, 0]` | What `pad` fills with. |
| `mean` | needed | Subtracted of each channel, out of 0 to 1. |
| `std` | needed | Divided by. |
"""


def recipes_page() -> str:
    """docs/recipes.md."""
    out = [
        "# Recipes of `edgemed finetune`\n",
        _MADE,
        "Every key of the TOML file that `--config` names, and what counts where it is left out. What to do with them: "
        "[finetuning.md](finetuning.md). Keys that do not exist, and values that contradict each other, are refused before anything is "
        "loaded. Paths are relative to the file.\n",
    ]
    for heading, table in _TABLES.items():
        if heading == "[optim]":
            out.append(_IMAGE)
        out.append(_recipe_section(heading, table))
    return "\n".join(out)


def _recipe_section(heading: str, table: type[Described]) -> str:
    rows = [
        (f"`{name}`", _left_out(heading, name, field), " ".join(field.description.split()))
        for name, field in table.model_fields.items()
        if field.description and name != "stage"
    ]
    title = f"## {heading}\n\n{_paragraphs(table.__doc__ or '')}\n\n" if heading else ""
    return title + _table(("key", "left out", ""), rows)


def _paragraphs(text: str) -> str:
    """A docstring as Markdown, each paragraph on a line."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def _left_out(heading: str, name: str, field: Any) -> str:
    """A key's default; where stages have their own, all of them."""
    own = [stage_defaults(stage) for stage in STAGES]
    found = [d.get("optim", {}).get(name) if heading == "[optim]" else d.get(name) if not heading else None for d in own]
    values = [_shown(field.get_default() if v is None else v) for v in found]
    if field.is_required():
        return "that of `model`" if name == "template" else "needed"
    return values[0] if len(set(values)) == 1 else ", ".join(f"{v} ({stage})" for v, stage in zip(values, STAGES, strict=True))


def _shown(value: Any) -> str:
    if value is None:
        return ""
    return f"`{str(value).lower()}`" if isinstance(value, bool) else f"`{list(value)}`" if isinstance(value, tuple) else f"`{value}`"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


PAGES = {"cli.md": cli_page, "models.md": models_page, "recipes.md": recipes_page}


def stale_pages(folder: Path = DOCS) -> list[str]:
    """Names of pages that differ from what would be written."""
    return [
        name for name, build in PAGES.items() if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != build()
    ]


def main(arguments: Sequence[str]) -> int:
    """Write the pages, or with --check tell which are out of date."""
    if "--check" in arguments:
        stale = stale_pages()
        if stale:
            print(f"Error: out of date in docs/: {', '.join(stale)}\nHint: Run: make docs", file=sys.stderr)
        return int(bool(stale))
    for name, build in PAGES.items():
        (DOCS / name).write_text(build(), encoding="utf-8")
        print(DOCS / name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
