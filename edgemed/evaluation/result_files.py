"""Reading what `edgemed eval --json` and `edgemed bench --json` or `--save x.json` have printed, in whatever order and mixture.

    results = load_results([Path("eval.json"), Path("bench.json")])
    results.scores, results.costs, results.notes

Tolerant: a file may hold a log with the JSON document as its last line; rows and keys that are of no use here are passed over, and rows
that look like results but cannot be read are named in `notes`. Documents of a newer schema are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemed.core.errors import InputError
from edgemed.core.files import found_at, os_errors

# 1: scores only, without a number in the document; 2: protocols with intervals beside them.
SCHEMA_VERSION = 2
METRICS = {"closed": "closed accuracy", "open": "open recall"}
# What `scores` of an evaluation without named protocols is.
DEFAULT_PROTOCOL = "strict"
_HINT = "Name files that `edgemed eval --json` and `edgemed bench --json` have written."


@dataclass(frozen=True)
class Score:
    """A model's accuracy in percent, with its 95 % interval where that is known."""

    model: str
    dataset: str
    split: str
    protocol: str
    metric: str
    percent: float
    low: float | None
    high: float | None
    questions: int


@dataclass(frozen=True)
class Cost:
    """What a model took on a device. `dynamic_bytes` is the paper's (all buffers on the device), `seen_bytes` what the device lost."""

    model: str
    device: str
    static_bytes: int
    dynamic_bytes: int
    seen_bytes: int | None
    decode_tokens_per_s: float
    emulated: bool

    @property
    def needed_bytes(self) -> int:
        """What a budget must hold: what was seen, where it was."""
        return self.dynamic_bytes if self.seen_bytes is None else max(self.seen_bytes, self.dynamic_bytes)


@dataclass(frozen=True)
class Results:
    """Everything that the files hold."""

    scores: tuple[Score, ...]
    costs: tuple[Cost, ...]
    notes: tuple[str, ...]


@dataclass
class _Found:
    scores: list[Score] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def load_results(paths: Sequence[Path]) -> Results:
    """Read all files. Raises InputError for one without results, and for the same measurement twice with other figures."""
    found = _Found()
    for path in paths:
        before = len(found.scores) + len(found.costs)
        _read_document(_load(path), path, found)
        if len(found.scores) + len(found.costs) == before:
            said = f" ({found.notes[-1]})" if found.notes else ""
            raise InputError(f"Expected results in {path.name}, found none{said}.", _HINT)
    scores = _unique(found.scores)
    return Results(scores, _unique(found.costs), (*found.notes, *_unlike(scores)))


def _unlike(scores: Sequence[Score]) -> Iterator[str]:
    """A note for every set of which models were asked different numbers of questions: they cannot be ranked by it."""
    counts: dict[tuple[str, str, str], set[int]] = {}
    for score in scores:
        counts.setdefault((score.dataset, score.split, score.metric), set()).update([score.questions] if score.questions else [])
    for (dataset, split, metric), found in counts.items():
        if len(found) > 1:
            told = ", ".join(map(str, sorted(found)))
            yield f"{dataset} {split}, {metric}: models were asked different numbers of questions ({told}) and cannot be compared"


def _load(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"Expected the file {path}, found {found_at(path)}.", "Check the path.")
    with os_errors(path):
        text = path.read_bytes().decode("utf-8", "replace").strip()
    for piece in (text, text.rsplit("\n", 1)[-1]):
        try:
            data = json.loads(piece)
        except (ValueError, RecursionError):
            continue
        if isinstance(data, dict):
            return data
    raise InputError(f"Expected a JSON document in {path.name}, found something else.", _HINT)


def _read_document(data: Mapping[str, Any], path: Path, found: _Found) -> None:
    version = data.get("schema_version", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise InputError(f"Expected results of schema {SCHEMA_VERSION} or below in {path.name}, found {version}.", "Use a newer edgemed.")
    rows = data.get("results", [data])
    if not isinstance(rows, list):
        raise InputError(f"Expected a list of results in {path.name}, found {type(rows).__name__}.", _HINT)
    for number, row in enumerate(rows, 1):
        try:
            _read_row(row, data, found, f"{path.name}, result {number}")
        except (KeyError, TypeError, ValueError) as error:
            found.notes.append(f"{path.name}, result {number} cannot be read: {type(error).__name__} {error}")


def _read_row(row: Mapping[str, Any], document: Mapping[str, Any], found: _Found, where: str) -> None:
    if "decode_tokens_per_s" in row:
        found.costs.append(_cost(row, document))
    elif "scores" in row or "protocols" in row:
        if row.get("blank"):
            found.notes.append(f"{where} is a control without the real image: left out")
            return
        found.scores.extend(_scores(row))
    else:
        found.notes.append(f"{where} is neither a score nor a measurement: left out")


def _model(row: Mapping[str, Any]) -> str:
    return Path(str(row["artifact"])).name if row.get("artifact") else str(row["model_id"])


def _cost(row: Mapping[str, Any], document: Mapping[str, Any]) -> Cost:
    seen = row.get("seen_bytes")
    return Cost(
        model=_model(row),
        device=str(row.get("device") or document.get("device") or "unknown"),
        static_bytes=int(row["seed_static_bytes"]),
        dynamic_bytes=int(row["seed_dynamic_bytes"]),
        seen_bytes=None if seen is None else int(seen),
        decode_tokens_per_s=_number(row["decode_tokens_per_s"]),
        emulated=bool(row.get("emulated")),
    )


def _number(value: Any) -> float:
    number = float(value)
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"expected a number, found {value}")
    return number


def _scores(row: Mapping[str, Any]) -> Iterable[Score]:
    protocols = row["protocols"] if "protocols" in row else {DEFAULT_PROTOCOL: row["scores"]}
    for protocol, values in protocols.items():
        for metric, long_name in METRICS.items():
            value = values.get(long_name, values.get(metric))
            if value is None or (isinstance(value, Mapping) and value["percent"] is None):
                continue
            percent, low, high, count = _metric(value, values.get(f"{metric}_n"), row, metric)
            yield Score(_model(row), str(row["dataset"]), str(row["split"]), str(protocol), metric, percent, low, high, count)


def _metric(value: Any, count: Any, row: Mapping[str, Any], metric: str) -> tuple[float, float | None, float | None, int]:
    """A bare number with its count beside it, or {percent, low, high, n}."""
    if isinstance(value, Mapping):
        bounds = [None if value.get(name) is None else _number(value[name]) for name in ("low", "high")]
        return _number(value["percent"]), bounds[0], bounds[1], int(value["n"])
    low, high = _interval([a.get("points") for a in row.get("answers", ()) if a.get("answer_type") == metric])
    return _number(value), low, high, int(count or 0)


def _interval(points: Sequence[Any]) -> tuple[float | None, float | None]:
    """Mean ± 1.96 standard errors in percent, within 0 to 100: for results that bring no interval of their own."""
    told = [100 * _number(p) for p in points if p is not None]
    if len(told) < 2:
        return None, None
    mean = sum(told) / len(told)
    half = 1.96 * math.sqrt(sum((p - mean) ** 2 for p in told) / (len(told) - 1) / len(told))
    return max(0.0, mean - half), min(100.0, mean + half)


def _unique(rows: Iterable[Any]) -> tuple[Any, ...]:
    """Rows once each. Raises InputError where one thing has two figures: nobody knows which is meant."""
    kept: dict[tuple[str, ...], Any] = {}
    for row in rows:
        key = (
            (row.model, row.dataset, row.split, row.protocol, row.metric)
            if isinstance(row, Score)
            else (row.model, row.device, str(row.emulated))
        )
        if kept.setdefault(key, row) != row:
            raise InputError(f"Expected one result for {', '.join(key)}, found two that differ.", "Leave one of the files out.")
    return tuple(kept.values())
