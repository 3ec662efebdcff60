"""`edgemed pareto`: accuracy against memory and speed, from what eval and bench have written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgemed.cli.options import (
    DeviceBudget,
    Json,
    LeastSpeed,
    MemoryBudget,
    Metrics,
    ParetoOut,
    PublishedFile,
    Quiet,
    ResultFiles,
    ScoreProtocol,
    WithPublished,
)
from edgemed.cli.output import Output

if TYPE_CHECKING:
    from edgemed.evaluation.published import Published

FORMATS = ("pareto.png", "pareto.svg", "pareto.json", "pareto.md")


def pareto(
    results: ResultFiles,
    out_dir: ParetoOut = Path("pareto"),
    protocol: ScoreProtocol = "strict",
    metric: Metrics = None,
    with_published: WithPublished = False,
    published: PublishedFile = None,
    device: DeviceBudget = None,
    budget: MemoryBudget = None,
    min_speed: LeastSpeed = 0.0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compare models by accuracy, memory and speed: which no other beats, and the best one for a device or a budget.

    RESULTS are files of `edgemed eval --json` and `edgemed bench --json`; a model needs one of each. Writes a picture (plots extra), as PNG
    and SVG, a JSON document and a Markdown page.
    """
    from json import dumps

    from edgemed.core.files import save_text
    from edgemed.evaluation import pareto_report
    from edgemed.evaluation.pareto import build_panels, choose
    from edgemed.evaluation.result_files import load_results
    from edgemed.report.plots import require_plots
    from edgemed.report.scatter import save_charts

    out = Output(json=json, quiet=quiet)
    require_plots()
    target, budget_bytes, device_name = _target(device, budget, min_speed)
    beside = _published(with_published, published)
    found = load_results(results)
    panels, notes = build_panels(found, protocol, _metrics(metric))
    notes = [*found.notes, *notes]
    choices = {p.title: choose(p, budget_bytes, min_speed, device_name) for p in panels} if target else {}
    told = {title: pareto_report.describe_choice(choice, target) for title, choice in choices.items()}
    picture, vector, data, page = (out_dir / name for name in FORMATS)
    note = "" if beside is None else "* not read in the source itself. Published figures are by others' methods: see pareto.md"
    save_charts([picture, vector], "Accuracy against memory and speed", pareto_report.build_charts(panels, beside), note)
    document = pareto_report.document(panels, choices, notes, beside)
    save_text(data, dumps(document, indent=1, ensure_ascii=False) + "\n")
    save_text(page, pareto_report.markdown(panels, told, notes, beside))
    for line in notes:
        out.warn(f"{line}.")
    for panel in panels:
        out.table(panel.title, pareto_report.COLUMNS, pareto_report.panel_rows(panel))
        for line in told.get(panel.title, ()):
            out.text(line)
    out.note(f"Written: {', '.join(str(out_dir / name) for name in FORMATS)}")
    out.result(document | {"files": [str(out_dir / name) for name in FORMATS]})


def _metrics(metric: str | None) -> tuple[str, ...]:
    from edgemed.core.errors import InputError
    from edgemed.evaluation.result_files import METRICS

    if metric is not None and metric not in METRICS:
        raise InputError(f"Expected --metric {' or '.join(METRICS)}, found '{metric}'.", "Leave it out for both.")
    return tuple(METRICS) if metric is None else (metric,)


def _target(device: str | None, budget: str | None, min_speed: float) -> tuple[str, int | None, str | None]:
    """(in words, bytes, device's name); no words where nothing was asked for. Raises InputError, ResourceError."""
    from edgemed.core.units import format_bytes, parse_bytes

    sizes, words, name = [], [], None
    if device is not None:
        from runtimes.devices import find_device, gpu_budget, host_budget

        profile = find_device(device)
        name = profile.name
        sizes.append(gpu_budget(profile) if profile.gpu else host_budget())
        words.append(f"{profile.title} with {format_bytes(sizes[-1])} to be had")
    if budget is not None:
        sizes.append(parse_bytes(budget))
        words.append(f"a budget of {format_bytes(sizes[-1])}")
    if min_speed:
        words.append(f"at least {min_speed:g} tokens/s")
    return " and ".join(words), min(sizes, default=None), name


def _published(wanted: bool, path: Path | None) -> Published | None:
    from edgemed.evaluation.published import PATH, load_published

    return load_published(path or PATH) if wanted or path else None
