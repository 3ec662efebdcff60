"""A Pareto comparison as charts, rows, Markdown and one JSON document.

rows = build_charts(panels, published)            # for report/scatter.py
document(panels, choices, notes, published); markdown(…)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from edgemed.core.units import format_bytes
from edgemed.evaluation.pareto import Candidate, Choice, LogFit, Panel
from edgemed.evaluation.published import Published, PublishedPoint
from edgemed.report.scatter import Chart, Mark

SCHEMA_VERSION = 1
COLUMNS = ("model", "accuracy", "95 % interval", "questions", "dynamic memory", "seen", "decode tokens/s", "device", "front")
_CURVE_POINTS = 60
PUBLISHED = "published by others (old metrics, test split)"
_TICKS = "published, accuracy not at hand"


def build_charts(panels: Sequence[Panel], published: Published | None) -> list[list[Chart]]:
    """A row a panel: accuracy against memory, with published points where wanted, and against speed."""
    return [[_memory_chart(panel, published), _speed_chart(panel)] for panel in panels]


def _memory_chart(panel: Panel, published: Published | None) -> Chart:
    marks = [_mark(panel, c, c.cost.dynamic_bytes / 1e9, c.on_memory_front) for c in panel.candidates]
    if published is not None:
        marks += [_published_mark(p) for p in published.points(panel.dataset, panel.metric)]
        marks += [_published_mark(p) for p in published.memory_only(panel.dataset, panel.metric)]
    x = [c.cost.dynamic_bytes / 1e9 for c in panel.candidates]
    return Chart(
        title=panel.title,
        x_label="dynamic memory, GB (all buffers on the device, weights included)",
        y_label=_y_label(panel),
        marks=tuple(marks),
        curve=_curve(panel.memory_fit, x),
        curve_label=_formula(panel.memory_fit, "GB"),
    )


def _speed_chart(panel: Panel) -> Chart:
    x = [c.cost.decode_tokens_per_s for c in panel.candidates]
    return Chart(
        title=panel.title,
        x_label="decoding, tokens/s",
        y_label=_y_label(panel),
        marks=tuple(_mark(panel, c, c.cost.decode_tokens_per_s, c.on_speed_front) for c in panel.candidates),
        curve=_curve(panel.speed_fit, x),
        curve_label=_formula(panel.speed_fit, "tokens/s"),
    )


def _mark(panel: Panel, candidate: Candidate, x: float, on_front: bool) -> Mark:
    score, devices = candidate.score, {c.cost.device for c in panel.candidates}
    label = candidate.name if len(devices) == 1 else f"{candidate.name} ({candidate.cost.device})"
    group = "edgemed, emulated" if candidate.cost.emulated else "edgemed, measured"
    return Mark(x, score.percent, label, group, score.low, score.high, on_front)


def _published_mark(point: PublishedPoint) -> Mark:
    x = point.dynamic_bytes / 1e9
    label = point.model if point.verified else f"{point.model} *"
    return Mark(x, point.percent, label, PUBLISHED if point.percent is not None else _TICKS)


def _y_label(panel: Panel) -> str:
    return "closed accuracy, %" if panel.metric == "closed" else "open recall, %"


def _curve(fit: LogFit | None, xs: Sequence[float]) -> tuple[tuple[float, float], ...]:
    if fit is None:
        return ()
    low, high = min(xs), max(xs)
    places = [low * (high / low) ** (i / (_CURVE_POINTS - 1)) for i in range(_CURVE_POINTS)]
    return tuple((x, fit.at(x)) for x in places)


def _formula(fit: LogFit | None, unit: str) -> str:
    if fit is None:
        return ""
    text = f"{fit.intercept:.1f} {'+' if fit.slope >= 0 else '-'} {abs(fit.slope):.2f} · ln({unit}), R² {fit.r2:.2f}, {fit.points} points"
    return text.replace("-", "−")


def panel_rows(panel: Panel) -> list[tuple[str, ...]]:
    """A row a candidate, the least memory first."""
    return [_row(c) for c in sorted(panel.candidates, key=lambda c: c.cost.dynamic_bytes)]


def _row(c: Candidate) -> tuple[str, ...]:
    interval = "" if c.score.low is None or c.score.high is None else f"{c.score.low:.1f} to {c.score.high:.1f} %"
    fronts = [name for name, on in (("memory", c.on_memory_front), ("speed", c.on_speed_front)) if on]
    return (
        c.name,
        f"{c.score.percent:.1f} %",
        interval,
        str(c.score.questions),
        format_bytes(c.cost.dynamic_bytes),
        "" if c.cost.seen_bytes is None else format_bytes(c.cost.seen_bytes),
        f"{c.cost.decode_tokens_per_s:.1f}",
        f"{c.cost.device}{' (emulated)' if c.cost.emulated else ''}",
        ", ".join(fronts),
    )


def describe_choice(choice: Choice, target: str) -> list[str]:
    """The best model in words, a line each."""
    lines = []
    if choice.best is None:
        lines.append(f"No model fits {target}.")
    else:
        c = choice.best
        lines.append(
            f"Best for {target}: {c.name}, {c.score.percent:.1f} %, {format_bytes(c.cost.needed_bytes)}, "
            f"{c.cost.decode_tokens_per_s:.1f} tokens/s (measured on {c.cost.device})."
        )
        if choice.as_good:
            names = ", ".join(f"{o.name} ({format_bytes(o.cost.needed_bytes)})" for o in choice.as_good)
            lines.append(f"Not told apart from it by their 95 % intervals: {names}.")
    return [*lines, *(f"Left out: {name} {why}." for name, why in choice.left_out)]


def document(panels: Sequence[Panel], choices: Mapping[str, Choice], notes: Sequence[str], published: Published | None) -> dict[str, Any]:
    """The JSON document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "pareto",
        "panels": [asdict(panel) | {"choice": asdict(choices[panel.title]) if panel.title in choices else None} for panel in panels],
        "notes": list(notes),
        "published": published.model_dump() if published is not None else None,
    }


def markdown(panels: Sequence[Panel], choices: Mapping[str, list[str]], notes: Sequence[str], published: Published | None) -> str:
    """A page: a table a panel, the fits, the choice, what was left out, and the published figures with their sources."""
    lines = ["# Accuracy against memory and speed", ""]
    for panel in panels:
        lines += [f"## {panel.title}", "", *_table(COLUMNS, panel_rows(panel)), ""]
        lines += [f"Fit: {_formula(f, unit)}." for f, unit in ((panel.memory_fit, "GB"), (panel.speed_fit, "tokens/s")) if f]
        lines += ["", *choices.get(panel.title, ()), ""]
    lines += [f"- {note}" for note in notes]
    if published is not None:
        lines += _published_lines(published)
    return "\n".join(lines).rstrip() + "\n"


def _published_lines(published: Published) -> list[str]:
    rows = [(m.model, f"{m.dynamic_gb:g} GB dynamic", m.source, m.place, _seen(m.verified)) for m in published.memory]
    rows += [(a.model, f"{a.percent:g} % {a.dataset} {a.metric}", a.source, a.place, _seen(a.verified)) for a in published.accuracy]
    lines = ["", "## Published by others", "", *_table(("model", "figure", "source", "place", "read in the source"), rows), ""]
    lines += [f"- **{name}**: {s.title}; {s.where}. How it came here: {s.basis}." for name, s in published.source.items()]
    lines += [f"- {claim.text} ({claim.source}, {claim.place})." for claim in published.claim]
    return [*lines, *(f"- Not at hand, {m.source}: {m.what}." for m in published.missing)]


def _seen(verified: bool) -> str:
    return "yes" if verified else "no"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]
