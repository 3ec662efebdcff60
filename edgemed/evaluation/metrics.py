"""Two strict metrics on normalised words, and their means.

closed: exact match after lower-casing and removing punctuation at the ends
open:   recall of the reference's words in the prediction, each counted at most as often as it stands there
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_SPLIT = re.compile(r"[^\w]+")


def words(text: str) -> list[str]:
    """Lower-cased words; everything but letters, digits and underscores separates."""
    return [w for w in _SPLIT.split(text.lower()) if w]


def closed_match(prediction: str, reference: str) -> bool:
    """True where both read the same, case and punctuation aside."""
    return words(prediction) == words(reference)


def open_recall(prediction: str, reference: str) -> float:
    """Σ min(count in prediction, count in reference) / number of reference words; an empty reference counts 0."""
    want = Counter(words(reference))
    return sum((Counter(words(prediction)) & want).values()) / sum(want.values()) if want else 0.0


@dataclass(frozen=True)
class Scores:
    """Means in percent over `closed_n` and `open_n` questions; None where there is no such question."""

    closed: float | None
    closed_n: int
    open: float | None
    open_n: int


def score(rows: Iterable[tuple[str, str, str]]) -> Scores:
    """(answer type, prediction, reference) → means. Rows of an unknown type do not count; the caller names them."""
    closed: list[float] = []
    opened: list[float] = []
    for answer_type, prediction, reference in rows:
        if answer_type == "closed":
            closed.append(float(closed_match(prediction, reference)))
        elif answer_type == "open":
            opened.append(open_recall(prediction, reference))
    return Scores(_percent(closed), len(closed), _percent(opened), len(opened))


def _percent(values: list[float]) -> float | None:
    return 100 * sum(values) / len(values) if values else None
