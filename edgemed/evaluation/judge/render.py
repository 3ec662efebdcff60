"""A judging's results as rows, Markdown and one JSON document.

Knows no judge and no terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from edgemed.evaluation.judge.cost import Cost
from edgemed.evaluation.judge.fair import Estimate, Fair
from edgemed.evaluation.judge.journal import Review
from edgemed.evaluation.judge.protocol import in_range
from edgemed.evaluation.judge.summary import GroupScore

SCHEMA_VERSION = 1
TABLE_COLUMNS = ("group", "reference", "model", "relative", "questions")
FAIR_COLUMNS = ("both orders", "value", "95 % interval")


@dataclass(frozen=True)
class Outcome:
    """Everything that a judging found. `instruction` is "published", "file" or "built in"."""

    judge: str
    protocol: str
    instruction: str
    instruction_sha256: str
    table: Mapping[str, GroupScore]
    fair: Fair | None
    reviews: Sequence[Review]
    cost: Cost


def table_rows(outcome: Outcome) -> list[tuple[str, ...]]:
    """LLaVA-Med's table, a row a group."""
    return [
        (group, f"{g.gpt4_score:.2f}", f"{g.pred_score:.2f}", f"{g.pred_relative_score:.1f} %", str(g.data_size))
        for group, g in outcome.table.items()
    ]


def fair_rows(fair: Fair) -> list[tuple[str, str, str]]:
    """The fair variant."""
    names = {
        "won": ("model better in both orders", " %"),
        "tied": ("neither better in both", " %"),
        "lost": ("reference better in both orders", " %"),
        "contradicted": ("of these the orders contradict each other", " %"),
        "model_score": ("model's score", ""),
        "reference_score": ("reference's score", ""),
        "mean_of_ratios": ("relative score, mean of ratios", " %"),
        "ratio_of_means": ("relative score, ratio of means", " %"),
        "place_bias": ("points for standing first", ""),
    }
    return [(name, *_shown(getattr(fair, field), unit)) for field, (name, unit) in names.items()]


def _shown(estimate: Estimate, unit: str) -> tuple[str, str]:
    interval = "one image only" if estimate.low is None else f"{estimate.low:.2f} to {estimate.high:.2f}{unit}"
    return f"{estimate.value:.2f}{unit}", interval


def unscored(reviews: Sequence[Review]) -> list[dict[str, Any]]:
    """What counts nowhere, and why."""
    return [{"question_id": r.question_id, "swapped": r.swapped, "why": r.why} for r in reviews if r.scores is None]


def out_of_range(reviews: Sequence[Review]) -> int:
    """Replies with a score outside 1 to 10: they count, as in LLaVA-Med's script."""
    return sum(r.scores is not None and not in_range(r.scores) for r in reviews)


def document(outcome: Outcome) -> dict[str, Any]:
    """The JSON document."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "judge",
        "judge": outcome.judge,
        "protocol": f"llava-med-{outcome.protocol}",
        "instruction": outcome.instruction,
        "instruction_sha256": outcome.instruction_sha256,
        "table": {group: asdict(score) for group, score in outcome.table.items()},
        "fair": asdict(outcome.fair) if outcome.fair else None,
        "unscored": unscored(outcome.reviews),
        "out_of_range": out_of_range(outcome.reviews),
        "cost": asdict(outcome.cost),
    }


def markdown(outcome: Outcome) -> str:
    """A page: the protocol's table, the fair one, and what did not count."""
    lost = unscored(outcome.reviews)
    lines = [f"## Judged by {outcome.judge}, LLaVA-Med's protocol {outcome.protocol}, instruction: {outcome.instruction}", ""]
    lines += _table(TABLE_COLUMNS, table_rows(outcome))
    if outcome.fair:
        lines += ["", f"{outcome.fair.questions} questions about {outcome.fair.images} images.", ""]
        lines += _table(FAIR_COLUMNS, fair_rows(outcome.fair))
    lines += ["", f"Replies without scores: {len(lost)} of {len(outcome.reviews)}."]
    lines += [f"- {row['question_id']}{' (exchanged)' if row['swapped'] else ''}: {row['why']}" for row in lost]
    return "\n".join([*lines, ""])


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows)]
