"""`edgemed bench` and `edgemed eval`: what a converted model costs, and how often it is right."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edgemed.cli.compose import engine_settings, require_artifact
from edgemed.cli.options import Blank, Datasets, Device, Folders, Json, Limit, Questions, Quiet, Save, Split
from edgemed.cli.output import Output


def bench(
    folders: Folders = None, device: Device = "cpu", questions: Questions = 30, save: Save = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Print the static card, then measured memory and speed by phase, then whether the device has room for it."""
    from bench.measure import measure_artifact
    from bench.render import check_ending, rows_of
    from bench.render import save as save_trace
    from runtimes.devices import find_device

    out = Output(json=json, quiet=quiet)
    profile = find_device(device)
    for path in save or []:
        check_ending(path)
    results: list[dict[str, Any]] = []
    for number, folder in enumerate(_folders(folders)):
        artifact = require_artifact(folder, out)
        with out.progress() as bar:
            trace = measure_artifact(artifact, profile, questions, partial(bar, f"Measuring {artifact.folder.name}"))
        title = f"{artifact.manifest.name}, {artifact.manifest.llm.quant}, {profile.title}"
        rows = rows_of(trace, profile)
        out.table(title, ("what", "value"), rows)
        for path in save or []:
            target = path if number == 0 else path.with_name(f"{path.stem}-{number + 1}{path.suffix}")
            save_trace(target, title, trace, rows, artifact.folder.name, profile.name)
            out.note(f"Written: {target}")
        results.append({"artifact": artifact.folder} | asdict(trace))
    out.result({"device": profile.name, "results": results})


def evaluate(
    dataset: Datasets,
    folders: Folders = None,
    split: Split = "validate",
    limit: Limit = None,
    blank: Blank = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure closed accuracy and open recall on question and answer sets."""
    from edgemed.data import load_samples
    from edgemed.evaluation.runner import evaluate as run_evaluation
    from runtimes.engine import Engine

    out = Output(json=json, quiet=quiet)
    sets = {name: load_samples(name, path, split)[:limit] for name, path in parse_datasets(dataset).items()}
    results: list[dict[str, Any]] = []
    for folder in _folders(folders):
        artifact = require_artifact(folder, out)
        with Engine.open(artifact, engine_settings(artifact)) as engine, out.progress() as bar:
            for name, samples in sets.items():
                evaluation = run_evaluation(engine, samples, blank=blank, progress=partial(bar, name))
                results.append({"artifact": artifact.folder, "dataset": name, "split": split} | asdict(evaluation))
    out.table("", ("model", "data set", "closed accuracy", "open recall", "seconds"), [_score_row(r) for r in results])
    out.result({"results": results})


def _folders(folders: list[Path] | None) -> list[Path | None]:
    return [*folders] if folders else [None]


def _score_row(result: dict[str, Any]) -> tuple[str, ...]:
    scores = result["scores"]
    shown = [f"{scores[k]:.1f} % of {scores[k + '_n']}" if scores[k] is not None else "no such question" for k in ("closed", "open")]
    return result["artifact"].name, f"{result['dataset']}, {result['split']}", *shown, f"{result['elapsed_s']:.0f}"


def parse_datasets(values: list[str]) -> dict[str, Path]:
    """NAME=PATH → {name: path}. Raises InputError."""
    from edgemed.core.errors import InputError

    parsed = {}
    for value in values:
        name, sep, path = value.partition("=")
        if not (sep and name and path):
            raise InputError(f"Expected --dataset NAME=PATH, found '{value}'.", "For example: --dataset slake=../data/slake")
        parsed[name] = Path(path)
    return parsed
