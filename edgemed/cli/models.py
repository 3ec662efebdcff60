"""`edgemed models`: what models.toml knows, what is on this machine, and pulling the rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgemed.cli.options import Json, ModelName, ModelNames, Quiet
from edgemed.cli.output import Output

if TYPE_CHECKING:
    from edgemed.core.registry import ModelEntry

app = typer.Typer(help="The models that edgemed knows by name.", no_args_is_help=True, rich_markup_mode=None)


def _state(entry: ModelEntry) -> str:
    from edgemed.core.manifest import MANIFEST_NAME
    from edgemed.core.paths import artifacts_dir
    from edgemed.core.registry import is_pulled

    if entry.not_convertible:
        return "not convertible"
    ready = [a.name for a in entry.artifacts if (artifacts_dir() / a.name / MANIFEST_NAME).is_file()]
    if ready:
        return "converted: " + ", ".join(ready)
    return "pulled" if all(is_pulled(part) for part in entry.sources.parts().values()) else "not pulled"


@app.command("list")
def list_models(json: Json = False) -> None:
    """List the models, their licences, and what is on this machine."""
    from edgemed.core.registry import load_registry

    out = Output(json=json)
    entries = load_registry().model
    rows = [(e.name, e.role, e.llm, e.tower, e.licence, _state(e)) for e in entries]
    out.table("", ("name", "role", "language model", "tower", "licence", "state"), rows)
    out.result({"models": [e.model_dump(mode="json") | {"state": _state(e)} for e in entries]})


@app.command("show")
def show_model(name: ModelName, json: Json = False) -> None:
    """Show one model: where its parts come from, how it is fed, its artifacts."""
    from edgemed.core.registry import load_registry

    out = Output(json=json)
    entry = load_registry().find(name)
    out.table(entry.title, ("what", "value"), _describe_entry(entry))
    out.result(entry.model_dump(mode="json") | {"state": _state(entry)})


def _describe_entry(entry: ModelEntry) -> list[tuple[str, str]]:
    rows = [
        ("name", entry.name),
        ("state", _state(entry)),
        ("licence", f"{entry.licence}. {entry.licence_note}".removesuffix(". ")),
        ("architecture", entry.architecture),
        ("language model", entry.llm),
        ("tower, projector", f"{entry.tower}, {entry.projector}"),
        ("image preparation", f"{entry.image.mode} to {entry.image.size_px} px"),
        ("conversation template", entry.template),
    ]
    for part, source in entry.sources.parts().items():
        rows.append((f"source: {part.replace('_', ' ')}", source.describe()))
    rows += [(f"artifact, {a.bits} bits", a.name) for a in entry.artifacts]
    rows += [("not convertible", entry.not_convertible)] if entry.not_convertible else []
    return rows + [("note", note) for note in entry.notes]


@app.command("pull")
def pull_model(name: ModelName, json: Json = False, quiet: Quiet = False) -> None:
    """Download a model's parts, resumed where a download was cut, and check their hashes."""
    from edgemed.core.registry import load_registry
    from edgemed.hub import pull

    out = Output(json=json, quiet=quiet)
    entry = load_registry().find(name)
    with out.progress() as progress:
        pulled = pull(entry, progress)
    for warning in pulled.warnings:
        out.warn(warning)
    for part, path in pulled.paths.items():
        out.text(f"{part.replace('_', ' ')}: {path}")
    out.result({"model": entry.name, "paths": pulled.paths, "warnings": pulled.warnings})


@app.command("verify")
def verify_models(names: ModelNames = None, json: Json = False, quiet: Quiet = False) -> None:
    """Compare pulled files with their recorded hashes, and converted ones with their manifests."""
    from edgemed.core.errors import HubError
    from edgemed.core.registry import load_registry

    out = Output(json=json, quiet=quiet)
    registry = load_registry()
    entries = [registry.find(name) for name in names] if names else list(registry.model)
    checked = [row for entry in entries for row in _verify_entry(entry)]
    out.table("", ("model", "what", "state"), [(c["model"], c["what"], c["state"]) for c in checked])
    out.result({"verified": checked})
    if damaged := [c for c in checked if c["hint"]]:
        raise HubError(f"Expected hashes that agree, found {len(damaged)} that do not.", damaged[0]["hint"])


def _verify_entry(entry: ModelEntry) -> list[dict[str, Any]]:
    from edgemed.core.errors import EdgemedError
    from edgemed.core.manifest import MANIFEST_NAME, load_artifact, verify_files
    from edgemed.core.paths import artifacts_dir
    from edgemed.hub import verify_pulled

    def check(what: str, agrees: Callable[[], bool]) -> dict[str, Any]:
        hint = ""
        try:
            state = "hashes agree" if agrees() else "not on this machine"
        except EdgemedError as error:  # one damaged file must not hide the others' state
            state, hint = error.message, error.hint
        return {"model": entry.name, "what": what, "state": state, "hint": hint}

    def converted(folder: Path) -> bool:
        verify_files(load_artifact(folder), use_cache=False)
        return True

    rows = [check(f"source: {part.replace('_', ' ')}", partial(verify_pulled, source)) for part, source in entry.sources.parts().items()]
    for artifact in entry.artifacts:
        folder = artifacts_dir() / artifact.name
        if (folder / MANIFEST_NAME).is_file():
            rows.append(check(f"artifact: {artifact.name}", partial(converted, folder)))
    return rows
