"""Pictures of measurements, with matplotlib (the `plots` extra), which is imported only when one is drawn.

save_timeline(Path("memory.png"), "tiny, Q4_K_M", "GB", [(0.0, 0.1), (0.5, 0.9)], [("load", 0.0, 0.4)])
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from edgemed.core.errors import MissingExtraError
from edgemed.core.files import atomic_path


def require_plots() -> None:
    """Raises MissingExtraError where there is no matplotlib."""
    if find_spec("matplotlib") is None:
        raise MissingExtraError.of("A picture", "plots")


def save_timeline(
    path: Path, title: str, label: str, points: Sequence[tuple[float, float]], spans: Sequence[tuple[str, float, float]]
) -> None:
    """A PNG of values over seconds, with named spans of time behind them. Raises MissingExtraError."""
    require_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = list(dict.fromkeys(name for name, _, _ in spans))
    for name, start, end in spans:
        axes.axvspan(start, end, color=f"C{names.index(name) % 10}", alpha=0.25, lw=0)
    for number, name in enumerate(names):
        axes.axvspan(0, 0, color=f"C{number % 10}", alpha=0.25, label=name)
    axes.plot([t for t, _ in points], [value for _, value in points], color="black", lw=1)
    axes.set(title=title, xlabel="s", ylabel=label)
    axes.set_ylim(bottom=0)
    if names:
        axes.legend(loc="lower right", ncols=len(names), fontsize="small")
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)


def save_curve(path: Path, title: str, across: str, label: str, points: Sequence[tuple[float, float]]) -> None:
    """A PNG of one value over another. Raises MissingExtraError."""
    require_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot([x for x, _ in points], [y for _, y in points], color="black", lw=1)
    axes.set(title=title, xlabel=across, ylabel=label)
    axes.grid(alpha=0.3)
    with atomic_path(path) as part:
        figure.savefig(part, format="png", dpi=120)
