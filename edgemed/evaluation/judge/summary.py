"""LLaVA-Med's table of a judge's scores, as its summarize_gpt_review.py makes it.

    table = summarise(items, scores)            # scores: {id: (reference's, model's)}; ids without any do not count, the caller names them

For each group (question type, first domain that is true, overall): the mean of the reference's scores, the mean of the model's, and
100 × the mean of model's / reference's, question by question. That is a mean of ratios, not the ratio of means.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgemed.evaluation.judge.questions import DOMAINS, Item

Scores = Mapping[str, tuple[float, float]]
GROUPS = ("conversation", "detailed_description", *DOMAINS, "overall")


@dataclass(frozen=True)
class GroupScore:
    """One column of LLaVA-Med's table; its names."""

    gpt4_score: float
    pred_score: float
    pred_relative_score: float
    data_size: int


def summarise(items: Sequence[Item], scores: Scores) -> dict[str, GroupScore]:
    """Group → means, in the table's order; a group without questions is left out."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for item in items:
        if item.id in scores:
            for group in dict.fromkeys((item.type, item.domain, "overall")):
                if group is not None:
                    groups.setdefault(group, []).append(scores[item.id])
    return {group: _mean(groups[group]) for group in GROUPS if group in groups}


def _mean(pairs: Sequence[tuple[float, float]]) -> GroupScore:
    n = len(pairs)
    return GroupScore(
        gpt4_score=sum(reference for reference, _ in pairs) / n,
        pred_score=sum(model for _, model in pairs) / n,
        pred_relative_score=sum([model / reference for reference, model in pairs]) / n * 100,
        data_size=n,
    )
