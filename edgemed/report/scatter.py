"""Points with labels, intervals, a marked front and a curve, in panels: for trade-offs. Drawn with matplotlib (the `plots` extra).

    save_charts([Path("pareto.png"), Path("pareto.svg")], "Accuracy against memory", [[chart, chart]])

Labels are placed so that they lie neither on each other nor on points (labels.py). The same charts give the same bytes. Knows nothing of
what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.core.files import atomic_path
from edgemed.report.labels import Box, place_labels
from edgemed.report.plots import require_plots

# Colours that are told apart also by those who see fewer (Okabe and Ito), and shapes beside them.
_STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
_PANEL_IN = (6.4, 4.4)
_DPI = 130
_POINT_PX = 13.0
_LEADER_PX = 22.0
_TICK_PT = 10.0
_TICK_PX = _TICK_PT * _DPI / 72
# A ratio of largest to smallest x from which on the axis is logarithmic.
_LOG_FROM = 4.0


@dataclass(frozen=True)
class Mark:
    """A point; `low` and `high` are its interval's ends. Without y it is a tick on the axis. `group` decides colour and shape."""

    x: float
    y: float | None
    label: str
    group: str
    low: float | None = None
    high: float | None = None
    on_front: bool = False


@dataclass(frozen=True)
class Chart:
    """One panel. `curve` is drawn as a line with its own label; groups are those of all charts, in the legend's order."""

    title: str
    x_label: str
    y_label: str
    marks: tuple[Mark, ...]
    curve: tuple[tuple[float, float], ...] = ()
    curve_label: str = ""


def save_charts(paths: Sequence[Path], title: str, rows: Sequence[Sequence[Chart]], note: str = "") -> None:
    """Draw a grid of charts and write it to every path, as its ending says (.png, .svg). Raises MissingExtraError."""
    require_plots()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(row) for row in rows)
    with matplotlib.rc_context({"svg.hashsalt": "edgemed", "font.size": 9, "axes.titlesize": 10, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(_PANEL_IN[0] * columns, _PANEL_IN[1] * len(rows) + 0.9), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, fontsize=12)
        axes = figure.subplots(len(rows), columns, squeeze=False)
        groups = list(dict.fromkeys(mark.group for row in rows for chart in row for mark in chart.marks))
        drawn = []
        for i, row in enumerate(rows):
            for j in range(columns):
                if j < len(row):
                    _draw(axes[i][j], row[j], groups)
                    drawn.append((axes[i][j], row[j]))
                else:
                    axes[i][j].set_axis_off()
        _legend(figure, groups, [chart for _, chart in drawn], note)
        figure.draw_without_rendering()  # places the axes, so that pixels mean something
        figure.set_layout_engine("none")
        for ax, chart in drawn:
            _label(figure, ax, chart)
        for path in paths:
            with atomic_path(path) as part:
                _save(figure, part, path.suffix.removeprefix("."))


def _save(figure: Any, path: Path, kind: str) -> None:
    figure.savefig(path, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else {"Software": None})


def _draw(ax: Any, chart: Chart, groups: Sequence[str]) -> None:
    from matplotlib.markers import TICKUP

    ax.set(title=chart.title, xlabel=chart.x_label, ylabel=chart.y_label)
    _scale_x(ax, chart)
    _scale_y(ax, chart)
    ax.grid(True, color="#dddddd", linewidth=0.6, zorder=0)
    if chart.curve:
        ax.plot([x for x, _ in chart.curve], [y for _, y in chart.curve], color="#666666", lw=1.2, ls="--", zorder=2)
        ax.text(0.015, 0.02, chart.curve_label, transform=ax.transAxes, fontsize=8, color="#444444", va="bottom", ha="left")
    bottom = ax.get_ylim()[0]
    for mark in chart.marks:
        colour, shape = _STYLES[groups.index(mark.group) % len(_STYLES)]
        if mark.y is None:
            ax.plot([mark.x], [bottom], marker=TICKUP, ms=_TICK_PT, mew=1.5, color=colour, clip_on=False, zorder=3)
            continue
        if mark.low is not None and mark.high is not None:
            ax.plot([mark.x, mark.x], [mark.low, mark.high], color=colour, lw=1.1, alpha=0.75, zorder=3)
        ax.plot([mark.x], [mark.y], shape, ms=7, color=colour, mec="white", mew=0.6, zorder=4)
        if mark.on_front:
            ax.plot([mark.x], [mark.y], shape, ms=12, mfc="none", mec=colour, mew=1.4, zorder=4)


def _scale_x(ax: Any, chart: Chart) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    xs = [mark.x for mark in chart.marks]
    low, high = min(xs), max(xs)
    if high / low >= _LOG_FROM:
        ax.set_xscale("log")
        ax.set_xlim(low / 1.6, high * 1.9)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        room = 0.35 * (high - low) or 0.5 * high
        ax.set_xlim(max(0.0, low - room), high + room)


def _scale_y(ax: Any, chart: Chart) -> None:
    ys = [y for mark in chart.marks for y in (mark.y, mark.low, mark.high) if y is not None]
    room = 0.2 * (max(ys) - min(ys)) + 1.0
    # A strip at the bottom for the curve's formula and for ticks without a height.
    ax.set_ylim(min(ys) - 1.8 * room, max(ys) + room)


def _legend(figure: Any, groups: Sequence[str], charts: Sequence[Chart], note: str) -> None:
    from matplotlib.lines import Line2D

    marks = [mark for chart in charts for mark in chart.marks]
    curve, interval = any(chart.curve for chart in charts), any(mark.low is not None for mark in marks)
    ticks = {mark.group for mark in marks if mark.y is None} - {mark.group for mark in marks if mark.y is not None}
    handles = []
    for number, group in enumerate(groups):
        colour, shape = _STYLES[number % len(_STYLES)]
        handles.append(Line2D([], [], color=colour, marker="|" if group in ticks else shape, mew=1.5, ls="", ms=7, label=group))
    handles.append(Line2D([], [], color="#444444", marker="o", mfc="none", ls="", ms=11, label="on the front (ours)"))
    if interval:
        handles.append(Line2D([], [], color="#444444", lw=1.1, marker="", label="95 % interval"))
    if curve:
        handles.append(Line2D([], [], color="#666666", lw=1.2, ls="--", label="logarithmic fit (ours)"))
    columns = min(3, len(handles))
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9, title=note or None)
    legend.get_title().set(fontsize=8, color="#444444")


def _label(figure: Any, ax: Any, chart: Chart) -> None:
    """Texts beside their points, with a thin line where the place is not at the point."""
    renderer = figure.canvas.get_renderer()
    frame = ax.get_window_extent(renderer)
    texts = [ax.text(0.5, 0.5, mark.label, transform=ax.transAxes, fontsize=8, zorder=5) for mark in chart.marks]
    anchors = [_anchor(ax, mark) for mark in chart.marks]
    sizes = [(box.width, box.height) for box in (text.get_window_extent(renderer) for text in texts)]
    inside = Box(frame.x0 + 3, frame.y0 + 3, frame.x1 - 3, frame.y1 - 3)
    centres = place_labels(anchors, sizes, _obstacles(ax, chart, anchors, renderer), inside)
    back = ax.transData.inverted()
    for text, anchor, centre, size in zip(texts, anchors, centres, sizes, strict=True):
        text.set(position=back.transform(centre), transform=ax.transData, ha="center", va="center")
        x, y, half_width, half_height = *centre, size[0] / 2, size[1] / 2
        edge = Box(x - half_width, y - half_height, x + half_width, y + half_height).nearest(anchor)
        if math.dist(edge, anchor) > _LEADER_PX:
            ends = [back.transform(anchor), back.transform(edge)]
            ax.plot([p[0] for p in ends], [p[1] for p in ends], color="#999999", lw=0.6, zorder=1)


def _anchor(ax: Any, mark: Mark) -> tuple[float, float]:
    """A point's pixels, or those of a tick's upper end."""
    x, y = ax.transData.transform((mark.x, ax.get_ylim()[0] if mark.y is None else mark.y))
    return float(x), float(y) + (_TICK_PX if mark.y is None else 0.0)


def _obstacles(ax: Any, chart: Chart, anchors: Sequence[tuple[float, float]], renderer: Any) -> list[Box]:
    half = _POINT_PX / 2
    boxes = [Box(x - half, y - half, x + half, y + half) for x, y in anchors]
    for mark, (x, y) in zip(chart.marks, anchors, strict=True):
        if mark.y is None:
            boxes.append(Box(x - 3, y - _TICK_PX, x + 3, y))
        if mark.low is not None and mark.high is not None:
            (x, low), (_, high) = ax.transData.transform([(mark.x, mark.low), (mark.x, mark.high)])
            boxes.append(Box(x - 2, low, x + 2, high))
    for point in chart.curve:
        x, y = ax.transData.transform(point)
        boxes.append(Box(x - 3, y - 3, x + 3, y + 3))
    for text in ax.texts[:1] if chart.curve else []:
        box = text.get_window_extent(renderer)
        boxes.append(Box(box.x0, box.y0, box.x1, box.y1))
    return boxes
