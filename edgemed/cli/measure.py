"""`edgemed bench`: what a converted model costs."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from edgemed.cli.compose import require_artifact
from edgemed.cli.options import Device, Folders, Json, Questions, Quiet, Save
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
    artifacts = [require_artifact(folder, out) for folder in _folders(folders)]  # all, before minutes go into the first
    for number, artifact in enumerate(artifacts):
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


def _folders(folders: list[Path] | None) -> list[Path | None]:
    return [*folders] if folders else [None]
