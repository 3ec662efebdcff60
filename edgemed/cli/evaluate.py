"""`edgemed eval`: how often converted models, a server or a prediction file are right, by every protocol, and how sure they may be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemed.cli.compose import require_artifact
from edgemed.cli.options import (
    Blank,
    CalibrateRun,
    Datasets,
    Endpoint,
    EndpointModel,
    Folders,
    Json,
    Limit,
    Looks,
    PredictionFile,
    Quiet,
    ReferenceModel,
    RunFolder,
    Slots,
    Split,
    Threads,
    TrainedOn,
)
from edgemed.cli.output import Output

if TYPE_CHECKING:
    from edgemed.data import DatasetName, Sample
    from edgemed.evaluation.leakage import Leak
    from edgemed.evaluation.results import Result
    from edgemed.evaluation.targets import Reply, Target

Sets = list[tuple["DatasetName", "list[Sample]"]]
SCHEMA_VERSION = 2


def evaluate(
    dataset: Datasets,
    folders: Folders = None,
    split: Split = "validate",
    limit: Limit = None,
    blank: Blank = False,
    looks: Looks = False,
    calibrate: CalibrateRun = False,
    trained_on: TrainedOn = None,
    out: RunFolder = None,
    predictions: PredictionFile = None,
    endpoint: Endpoint = None,
    endpoint_model: EndpointModel = None,
    reference: ReferenceModel = None,
    slots: Slots = 16,
    threads: Threads = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure accuracy on question and answer sets: three protocols with intervals, whether the model looks, and how sure it may be."""
    from edgemed.core.errors import EdgemedError
    from edgemed.core.files import require_writable
    from edgemed.data import load_named, parse_dataset

    said = Output(json=json, quiet=quiet)
    sets: Sets = [(named, load_named(named)[:limit]) for named in (parse_dataset(text, split) for text in dataset)]
    _check(sets, folders, predictions, endpoint, reference, calibrate, blank)
    training = [load_named(parse_dataset(text, "train")) for text in trained_on or []]
    leaks = [_leak(samples, training, said) for _, samples in sets]
    results: list[dict[str, Any]] = []
    failed: EdgemedError | None = None
    if predictions is not None:
        results.append(_read(predictions, sets[0], leaks[0], said))
    else:
        asked: list[Path | None] = [*folders] if folders else [None]
        for folder in asked if endpoint is None and reference is None else []:  # all, before minutes go into the first
            artifact = require_artifact(folder, said)
            if calibrate:
                require_writable(artifact.folder)
        for folder in asked:
            with _open(folder, endpoint, endpoint_model, reference, slots, threads, said) as target:
                views = ("blank",) if blank else ("shown", "blank", "mirrored", "swapped") if looks else ("shown",)
                found = [_ask(target, named, samples, views, out, leak, said) for (named, samples), leak in zip(sets, leaks, strict=True)]
                results += found
                if calibrate:
                    try:
                        _calibrate(target, sets, found, said)
                    except EdgemedError as error:  # what was measured is shown all the same
                        failed = failed or error
    _show(results, said)
    said.result({"schema_version": SCHEMA_VERSION, "results": [_plain(r) for r in results]})
    if failed is not None:
        raise failed


def _check(
    sets: Sets,
    folders: Sequence[Path] | None,
    predictions: Path | None,
    endpoint: str | None,
    reference: Path | None,
    calibrate: bool,
    blank: bool,
) -> None:
    from edgemed.core.errors import InputError

    others = [name for name, given in (("--predictions", predictions), ("--endpoint", endpoint), ("--reference", reference)) if given]
    if len(others) > 1 or (others and folders):
        given = " and ".join([*others, *(["DIR"] if folders else [])])
        raise InputError(f"Expected one kind of thing to measure, found {given}.", "Choose one.")
    if predictions and len(sets) > 1:
        raise InputError(f"Expected one --dataset with --predictions, found {len(sets)}.", "A prediction file is about one set.")
    if calibrate and (others or blank):
        raise InputError("Expected --calibrate with converted models that see their images, found something else.", "Leave it out.")


@contextmanager
def _open(
    folder: Path | None,
    endpoint: str | None,
    model: str | None,
    reference: Path | None,
    slots: int,
    threads: int | None,
    said: Output,
) -> Iterator[Target]:
    from edgemed.evaluation.targets import EndpointTarget, EngineTarget

    if endpoint is not None:
        import os

        yield EndpointTarget(endpoint, model or "default", os.environ.get("OPENAI_API_KEY") or "none")
    elif reference is not None:
        from edgemed.evaluation.reference import ReferenceTarget

        yield ReferenceTarget(reference)
    else:
        with EngineTarget(require_artifact(folder, said), slots, threads=threads, workers=None) as target:
            yield target


def _ask(
    target: Target, named: DatasetName, samples: list[Sample], views: Sequence[Any], out: Path | None, leak: Leak | None, said: Output
) -> dict[str, Any]:
    """One target on one set: the answers before each kind of image, scored."""
    import time

    from edgemed.evaluation.results import build_result
    from edgemed.evaluation.runner import run

    begun = time.monotonic()
    replies: dict[str, list[Reply]] = {}
    with said.progress() as bar:
        for view in views:
            place = out / _safe(target.name) / _safe(f"{named.name}-{named.label}") / view if out else None
            label = named.name if view == "shown" else f"{named.name}, {view}"
            replies[view] = run(target, samples, view, place, partial(bar, label))
    first = replies[views[0]]
    others = {view: [r.text for r in found] for view, found in replies.items() if view != views[0]}
    result = build_result(samples, [r.text for r in first], [r.score for r in first], others, [r.error for r in first])
    _warn(named, result, leak, said)
    return _row(named, result, leak) | {
        "artifact": getattr(getattr(target, "artifact", None), "folder", None),
        "model_id": target.name,
        "blank": views[0] == "blank",
        "elapsed_s": time.monotonic() - begun,
        "replies": first,
    }


def _read(path: Path, one: tuple[DatasetName, list[Sample]], leak: Leak | None, said: Output) -> dict[str, Any]:
    """A prediction file of anybody's, scored."""
    from edgemed.evaluation.predictions import load_predictions, pair
    from edgemed.evaluation.results import build_result
    from edgemed.evaluation.runner import check_ids

    named, samples = one
    check_ids(samples)
    rows = pair(samples, load_predictions(path))
    sure = [float(s) if isinstance(s := r.metadata.get("score"), int | float) else None for r in rows]
    result = build_result(samples, [r.text for r in rows], sure)
    _warn(named, result, leak, said)
    model = rows[0].model_id or path.name
    return _row(named, result, leak) | {"artifact": None, "model_id": model, "blank": False, "elapsed_s": 0.0, "replies": []}


def _row(named: DatasetName, result: Result, leak: Leak | None) -> dict[str, Any]:
    return {"dataset": named.name, "split": named.label, "result": result, "leak": asdict(leak) if leak else None}


def _leak(samples: list[Sample], training: list[list[Sample]], said: Output) -> Leak | None:
    if not training:
        return None
    from edgemed.evaluation.leakage import find_leaks

    with said.progress() as bar:
        return find_leaks(samples, [s for part in training for s in part], partial(bar, "Comparing images"))


def _warn(named: DatasetName, result: Result, leak: Leak | None, said: Output) -> None:
    for word, ids in result.unknown.items():
        said.warn(f"{named.name}: {len(ids)} question(s) of the answer type '{word}' have no score: {', '.join(ids[:5])}")
    for error, ids in result.failed.items():
        said.warn(f"{named.name}: {len(ids)} question(s) were not answered and count as wrong ({error}): {', '.join(ids[:5])}")
    if leak and leak.images:
        said.warn(
            f"{named.name}, {named.label}: {leak.images} of {leak.of_images} images are in what the model was trained on, "
            f"with {leak.questions} of {leak.of_questions} questions: these figures say little."
        )


def _calibrate(target: Target, sets: Sets, found: Sequence[Mapping[str, Any]], said: Output) -> None:
    from edgemed.core.calibration import save_calibration
    from edgemed.core.errors import DatasetError
    from edgemed.data import hash_samples
    from edgemed.evaluation.confidence import build_calibration, study
    from edgemed.evaluation.results import judge_answers
    from edgemed.evaluation.targets import EngineTarget

    assert isinstance(target, EngineTarget)
    judged = []
    for (_, samples), row in zip(sets, found, strict=True):
        judged += judge_answers(samples, [r.text for r in row["replies"]], [r.score for r in row["replies"]])
    report = study(judged) if judged else None
    if report is None:
        raise DatasetError("Expected scored questions about images of two halves, found too few.", "Calibrate on a larger set.")
    on = "; ".join(f"{named.name} {named.label}, {len(samples)} questions" for named, samples in sets)
    everything = hash_samples([s for _, samples in sets for s in samples])
    path = save_calibration(target.artifact.folder, build_calibration(judged, report, on, target.model_sha256, everything))
    said.note(f"Written: {path} ({report.method}, calibration error {report.ece[report.method]:.3f} on halves that were not fitted)")


def _safe(name: str) -> str:
    import re

    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in row.items() if k not in ("result", "replies")} | asdict(row["result"])


# -- tables -------------------------------------------------------------------------------------------------------------


def _show(results: Sequence[Mapping[str, Any]], said: Output) -> None:
    said.table("", ("model", "data set", "closed, exact match", "open recall", "seconds"), [_score_row(r) for r in results])
    rows = [line for r in results for line in _protocol_rows(r)]
    said.table("By protocol, % with 95 % intervals over images", ("model", "data set", "protocol", "closed accuracy", "open recall"), rows)
    for key, title in (("by_modality", "By modality, strict"), ("by_organ", "By organ, strict")):
        parts = [line for r in results for line in _part_rows(r, getattr(r["result"], key))]
        if parts:
            said.table(title, ("model", "data set", "", "closed accuracy", "open recall"), parts)
    seen = [line for r in results for line in _look_rows(r)]
    if seen:
        said.table("Does it look? Other images", ("model", "data set", "image", "same answers", "closed accuracy", "open recall"), seen)
    sure = [_sure_row(r) for r in results if r["result"].confidence]
    if sure:
        columns = ("model", "data set", "calibration error", "accuracy at 100, 80, 50 %", "answered by the 10 % rule", "wrong among them")
        said.table("How sure it may be, on halves that were not fitted", columns, sure)


def _head(row: Mapping[str, Any]) -> tuple[str, str]:
    return (row["artifact"].name if row["artifact"] else row["model_id"]), f"{row['dataset']}, {row['split']}"


def _score_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    scores = asdict(row["result"].scores)
    shown = [f"{scores[k]:.1f} % of {scores[k + '_n']}" if scores[k] is not None else "no such question" for k in ("closed", "open")]
    return *_head(row), *shown, f"{row['elapsed_s']:.0f}"


def _protocol_rows(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(*_head(row), name, *_pair(table)) for name, table in row["result"].protocols.items()]


def _part_rows(row: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [(*_head(row), word, *_pair(table)) for word, table in parts.items()]


def _look_rows(row: Mapping[str, Any]) -> list[tuple[str, ...]]:
    return [(*_head(row), view, str(look.same), *_pair(look.strict)) for view, look in row["result"].looks.items()]


def _pair(table: Mapping[str, Any]) -> tuple[str, str]:
    return str(table.get("closed accuracy", "–")), str(table.get("open recall", "–"))


def _sure_row(row: Mapping[str, Any]) -> tuple[str, ...]:
    report = row["result"].confidence
    curve = dict(report.curve)
    accuracies = ", ".join(f"{curve[c]:.1f}" for c in (1.0, 0.8, 0.5))
    r = report.referral
    wrong = "–" if r.wrong_percent is None else f"{r.wrong_percent:.1f} % ({r.low:.1f}–{r.high:.1f})"
    return *_head(row), f"{report.ece[report.method]:.3f} ({report.method})", accuracies, f"{r.answered} of {r.asked}", wrong
