"""Accuracy against memory and speed: which models no other beats, a logarithmic fit, and the best one for a budget.

    panels = build_panels(results, protocol="strict")        # one a data set and metric
    panel.candidates[0].on_memory_front; panel.memory_fit
    choose(panel, budget_bytes=4_000_000_000, least_tokens_per_s=5.0)

A model is on a front if no other is at least as good in both and better in one. Knows no files and draws nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from edgemed.core.errors import InputError
from edgemed.evaluation.result_files import Cost, Results, Score

# Fewer points than this, or fewer different places, bear no curve of two coefficients.
LEAST_FIT_POINTS = 3


@dataclass(frozen=True)
class Candidate:
    """A model on a device: what it scores and what it takes."""

    score: Score
    cost: Cost
    on_memory_front: bool = False
    on_speed_front: bool = False

    @property
    def name(self) -> str:
        return self.score.model


@dataclass(frozen=True)
class LogFit:
    """percent = intercept + slope · ln(x), by least squares; x in GB (1e9 bytes) or tokens a second. `r2` is its share of the variance."""

    intercept: float
    slope: float
    r2: float
    points: int

    def at(self, x: float) -> float:
        """The curve's percent."""
        return self.intercept + self.slope * math.log(x)


@dataclass(frozen=True)
class Panel:
    """One data set, split, protocol and metric."""

    dataset: str
    split: str
    protocol: str
    metric: str
    candidates: tuple[Candidate, ...]
    memory_fit: LogFit | None
    speed_fit: LogFit | None

    @property
    def title(self) -> str:
        return f"{self.dataset} {self.split}, {self.metric}, {self.protocol}"


@dataclass(frozen=True)
class Choice:
    """The best model within a budget, those whose interval overlaps its own, and what was left out and why."""

    best: Candidate | None
    as_good: tuple[Candidate, ...]
    left_out: tuple[tuple[str, str], ...]


def find_front(points: Sequence[tuple[float, float]], more_is_better: bool) -> list[bool]:
    """For each (x, percent): whether no other beats it; x is wanted low, or high with `more_is_better`."""
    sign = -1.0 if more_is_better else 1.0

    def beaten(mine: tuple[float, float], other: tuple[float, float]) -> bool:
        x, y = sign * mine[0], mine[1]
        ox, oy = sign * other[0], other[1]
        return ox <= x and oy >= y and (ox < x or oy > y)

    return [not any(beaten(point, other) for other in points) for point in points]


def fit_log(points: Sequence[tuple[float, float]]) -> LogFit | None:
    """Fit (x, percent), x above 0; None where there are too few points."""
    usable = [(x, y) for x, y in points if x > 0]
    if len({x for x, _ in usable}) < LEAST_FIT_POINTS:
        return None
    x, y = np.log([p[0] for p in usable]), np.array([p[1] for p in usable])
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())
    intercept = float(y.mean() - slope * x.mean())
    total = float(((y - y.mean()) ** 2).sum())
    left = float(((y - intercept - slope * x) ** 2).sum())
    return LogFit(intercept, slope, 1.0 - left / total if total > 0 else 0.0, len(usable))


def build_panels(results: Results, protocol: str, metrics: Sequence[str]) -> tuple[list[Panel], list[str]]:
    """Panels, and notes on models that lack a score or a measurement. Raises InputError where nothing fits together."""
    scores = [s for s in results.scores if s.protocol == protocol and s.metric in metrics]
    if not scores:
        known = sorted({s.protocol for s in results.scores}) or ["none"]
        raise InputError(
            f"Expected scores of the protocol '{protocol}', found {', '.join(known)}.",
            "Name `edgemed eval --json` files, or --protocol.",
        )
    measured = {c.model for c in results.costs}
    notes = [f"{model} has a score but no measurement: left out" for model in sorted({s.model for s in scores} - measured)]
    notes += [f"{model} has a measurement but no score: left out" for model in sorted(measured - {s.model for s in scores})]
    panels = []
    for key in dict.fromkeys((s.dataset, s.split, s.metric) for s in scores):
        mine = [s for s in scores if (s.dataset, s.split, s.metric) == key]
        pairs = [Candidate(s, c) for s in mine for c in results.costs if c.model == s.model]
        if pairs:
            panels.append(_panel(key, protocol, pairs))
    if not panels:
        raise InputError(
            "Expected a score and a measurement of the same model, found no model with both.",
            "Name files of `edgemed eval --json` and `edgemed bench --json` for the same folders.",
        )
    return panels, notes


def _panel(key: tuple[str, str, str], protocol: str, pairs: Sequence[Candidate]) -> Panel:
    def points(x: Callable[[Cost], float]) -> list[tuple[float, float]]:
        return [(x(p.cost), p.score.percent) for p in pairs]

    memory, speed = points(lambda c: c.dynamic_bytes / 1e9), points(lambda c: c.decode_tokens_per_s)
    fronts = zip(find_front(memory, more_is_better=False), find_front(speed, more_is_better=True), strict=True)
    marked = tuple(Candidate(p.score, p.cost, m, s) for p, (m, s) in zip(pairs, fronts, strict=True))
    dataset, split, metric = key
    return Panel(dataset, split, protocol, metric, marked, fit_log(memory), fit_log(speed))


def choose(panel: Panel, budget_bytes: int | None, least_tokens_per_s: float, device: str | None = None) -> Choice:
    """The most accurate candidate that fits; of equals the one that takes least. With `device`, measurements made there count alone
    where a model has any."""
    there = {c.name for c in panel.candidates if c.cost.device == device}
    fitting, left_out = [], []
    for candidate in panel.candidates:
        if candidate.name in there and candidate.cost.device != device:
            continue
        why = _unfit(candidate.cost, budget_bytes, least_tokens_per_s)
        if why:
            left_out.append((candidate.name, why))
        else:
            fitting.append(candidate)
    best = min(fitting, key=lambda c: (-c.score.percent, c.cost.needed_bytes, c.name), default=None)
    if best is None:
        return Choice(None, (), tuple(left_out))
    rest = [c for c in fitting if c is not best and _overlaps(c.score, best.score)]
    return Choice(best, tuple(sorted(rest, key=lambda c: c.cost.needed_bytes)), tuple(left_out))


def _unfit(cost: Cost, budget_bytes: int | None, least_tokens_per_s: float) -> str:
    if budget_bytes is not None and cost.needed_bytes > budget_bytes:
        return f"needs {cost.needed_bytes / 1e9:.2f} GB of {budget_bytes / 1e9:.2f} GB"
    if cost.decode_tokens_per_s < least_tokens_per_s:
        return f"{cost.decode_tokens_per_s:.1f} tokens/s where {least_tokens_per_s:g} are wanted"
    return ""


def _overlaps(a: Score, b: Score) -> bool:
    """Whether the intervals share a value; without intervals nothing can be told apart but equal figures."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return a.percent == b.percent
    return a.low <= b.high and b.low <= a.high
