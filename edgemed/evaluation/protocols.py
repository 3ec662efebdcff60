"""Three ways to score the same answers: two that the field has published with, and a strict one. Columns of one table.

    values = PROTOCOLS["medmoe"](Scored("closed", "Is it normal?", "Yes.", "Yes"))      # {"closed accuracy": 1.0, …}
    table = summarise(rows, images)                                                     # {protocol: {measure: Measure}}

medmoe       Med-MoE's run_eval.py, which TinyLLaVA-Med-F uses: lower case; closed is right where the reference stands anywhere in the
             prediction ("no" is right for "normal"); published "open" is its recall, published "closed" its accuracy.
llavamed-v1  LLaVA-Med v1.0's run_eval.py after its pull request 35: texts are normalised first; closed must hold "yes" or "no" besides,
             also as part of a word. Its "open accuracy" against a list of training answers that was never published is left out.
strict       ours: closed by the first yes or no, or the first of the options that the question names, as whole words; open by recall
             that counts a word at most as often as the reference has it; both also as an exact match, case and punctuation aside.

Formulas: evaluation-protocol.md, 3.2 to 3.8. A row of an unknown answer type has no values: callers count and name them.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemed.evaluation.metrics import closed_match, open_recall, words
from edgemed.evaluation.normal import count_words, normalise_answer

F64 = NDArray[np.float64]
Values = dict[str, float]
RESAMPLES = 2000
# nltk's SmoothingFunction().method1, and what its method0 puts in a zero's place.
_EPSILON = 0.1
_ORDERS = ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0))
_YES_NO = ("yes", "no")
_LISTED = re.compile(r"[\[(]([^\])]*[,/][^\])]*)[\])]")
_OR = re.compile(r"(\w[\w-]*)\s*,?\s+or\s+(?:the\s+|an?\s+)?(\w[\w-]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Scored:
    """A row to be scored. `answer_type` is closed, open or unknown."""

    answer_type: str
    question: str
    prediction: str
    reference: str


@dataclass(frozen=True)
class Measure:
    """A mean in percent over `n` rows, and the 95 % bootstrap interval over images; None where there is one image only."""

    percent: float
    n: int
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = f" ({self.low:.1f}–{self.high:.1f})" if self.low is not None else ""
        return f"{self.percent:.1f}{interval}, n {self.n}"


# -- the field's --------------------------------------------------------------------------------------------------------


def overlap(prediction: str, reference: str) -> Values:
    """exact match (a precision, really), F1, precision and recall of normalised words; true positives are counted in the prediction."""
    found, wanted = count_words(normalise_answer(prediction)), count_words(normalise_answer(reference))
    total = sum(found.values())
    exact = sum(word in found for word in wanted) / total if total else 0.0
    hits = sum(count for word, count in found.items() if word in wanted)
    missed = sum(count for word, count in wanted.items() if word not in found)
    if not hits:
        return {"exact match": exact, "f1": 0.0, "precision": 0.0, "recall": 0.0}
    precision, recall = hits / total, hits / (hits + missed)
    return {"exact match": exact, "f1": 2 * precision * recall / (precision + recall), "precision": precision, "recall": recall}


def bleu(prediction: str, reference: str, weights: Sequence[float], smoothed: bool) -> float:
    """nltk's sentence_bleu on words between blanks with one reference: method1's smoothing, or none."""
    found, wanted = prediction.split(), reference.split()
    precisions = [_precision(found, wanted, n + 1) for n in range(len(weights))]
    if not precisions[0][0]:
        return 0.0
    penalty = 1.0 if len(found) > len(wanted) else math.exp(1 - len(wanted) / len(found))
    logs = []
    for weight, (hits, total) in zip(weights, precisions, strict=True):
        nothing = _EPSILON / total if smoothed else sys.float_info.min
        logs.append(weight * math.log(hits / total if hits else nothing))
    return penalty * math.exp(math.fsum(logs))


def _precision(found: list[str], wanted: list[str], n: int) -> tuple[int, int]:
    have, want = (Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1)) for text in (found, wanted))
    return sum((have & want).values()), max(1, sum(have.values()))


def score_medmoe(row: Scored) -> Values:
    """Med-MoE's and the paper's, bit for bit."""
    prediction, reference = row.prediction.lower(), row.reference.lower()
    values = overlap(prediction, reference)
    if row.answer_type == "closed":
        del values["exact match"]
        return {"closed accuracy": float(reference in prediction)} | {f"closed {name}": value for name, value in values.items()}
    if row.answer_type == "open":
        scores = {f"bleu-{n + 1}": bleu(prediction, reference, weights, smoothed=True) for n, weights in enumerate(_ORDERS)}
        return {f"open {name}": value for name, value in (values | scores).items()}
    return {}


def score_llavamed(row: Scored) -> Values:
    """LLaVA-Med v1.0's, with the denominators that its pull request 35 put right."""
    prediction, reference = (normalise_answer(text.lower()) for text in (row.prediction, row.reference))
    if row.answer_type == "closed":
        said = any(word in prediction for word in _YES_NO)
        return {"closed accuracy": float(said and reference in prediction)}
    if row.answer_type == "open":
        scores = {"bleu": bleu(prediction, reference, (0.25,) * 4, smoothed=False)}
        scores |= {f"bleu-{n + 1}": bleu(prediction, reference, weights, smoothed=False) for n, weights in enumerate(_ORDERS)}
        return {f"open {name}": value for name, value in (overlap(prediction, reference) | scores).items()}
    return {}


# -- ours ---------------------------------------------------------------------------------------------------------------


def options_of(question: str) -> list[str]:
    """What a question offers to choose from: "[yes, no]", "(left/right)", or the words beside each "or"; empty where it offers nothing."""
    listed = _LISTED.search(question)
    if listed:
        return [option.strip() for option in re.split(r"[,/]", listed[1]) if option.strip()]
    return list(dict.fromkeys(word for pair in _OR.findall(question) for word in pair))


def closed_right(question: str, prediction: str, reference: str) -> bool:
    """Whether the first yes or no, or the first option of the question, is the reference, as whole words; else an exact match."""
    wanted, said = words(reference), words(prediction)
    if len(wanted) == 1 and wanted[0] in _YES_NO:
        return next((word for word in said if word in _YES_NO), None) == wanted[0]
    options = [words(option) for option in options_of(question)]
    if wanted not in options:
        return said == wanted
    # The longer option where two begin at one place, as in "right lung" and "right".
    places = [(at, -len(option), option) for option in options if (at := _find(said, option)) is not None]
    return bool(places) and min(places)[2] == wanted


def _find(said: list[str], option: list[str]) -> int | None:
    return next((i for i in range(len(said) - len(option) + 1) if option and said[i : i + len(option)] == option), None)


def is_right(row: Scored) -> bool | None:
    """The strict yes or no that confidence is about: closed as above, open the same words in any order; None for an unknown type."""
    if row.answer_type == "closed":
        return closed_right(row.question, row.prediction, row.reference)
    return Counter(words(row.prediction)) == Counter(words(row.reference)) if row.answer_type == "open" else None


def score_strict(row: Scored) -> Values:
    """Whole words only."""
    exact = float(closed_match(row.prediction, row.reference))
    if row.answer_type == "closed":
        return {"closed accuracy": float(closed_right(row.question, row.prediction, row.reference)), "closed exact match": exact}
    if row.answer_type == "open":
        return {"open recall": open_recall(row.prediction, row.reference), "open exact match": exact}
    return {}


PROTOCOLS: dict[str, Callable[[Scored], Values]] = {"medmoe": score_medmoe, "llavamed-v1": score_llavamed, "strict": score_strict}


# -- means and intervals ------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Scored], images: Sequence[str], resamples: int = RESAMPLES) -> dict[str, dict[str, Measure]]:
    """Every protocol's means. `images` names each row's image: intervals resample images, as questions about one go together."""
    return {name: measure([score(row) for row in rows], images, resamples) for name, score in PROTOCOLS.items()}


def measure(values: Sequence[Values], groups: Sequence[str], resamples: int = RESAMPLES) -> dict[str, Measure]:
    """Means of each measure over the rows that have it, with percentile bootstrap intervals over groups (seed 0)."""
    names = list(dict.fromkeys(name for row in values for name in row))
    order = {group: index for index, group in enumerate(dict.fromkeys(groups))}
    sums, counts = np.zeros((len(order), len(names))), np.zeros((len(order), len(names)))
    for row, group in zip(values, groups, strict=True):
        for name, value in row.items():
            sums[order[group], names.index(name)] += value
            counts[order[group], names.index(name)] += 1
    intervals = bootstrap(sums, counts, resamples)
    out = {}
    for k, name in enumerate(names):
        found = [row[name] for row in values if name in row]
        out[name] = Measure(100 * sum(found) / len(found), len(found), *intervals[k])
    return out


def bootstrap(sums: F64, counts: F64, resamples: int = RESAMPLES) -> list[tuple[float | None, float | None]]:
    """95 % percentile intervals, in percent, of Σ sums / Σ counts over resampled rows of both, [groups, measures]."""
    groups = len(sums)
    if groups < 2:
        return [(None, None)] * sums.shape[1]
    weights = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), resamples).astype(np.float64)
    totals = weights @ counts
    means = np.divide(weights @ sums, totals, out=np.full_like(totals, np.nan), where=totals > 0)
    return [tuple(100 * float(x) for x in np.nanpercentile(column, (2.5, 97.5))) for column in means.T]  # type: ignore[misc]
