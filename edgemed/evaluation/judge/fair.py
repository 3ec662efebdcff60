"""The fair variant: every question judged twice, with the answers' places exchanged; ties; intervals.

    fair = compare_fairly(items, forward, swapped)       # both: {id: (reference's score, the model's score)}

A question is won (or lost) only if it is so in both orders; else it is a tie. Scores are means of both orders. Intervals are 95 %
percentile bootstraps that draw whole images (questions about one image are not independent), 10,000 times, with a fixed seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgemed.evaluation.judge.questions import Item
from edgemed.evaluation.judge.summary import Scores

F64 = NDArray[np.float64]
DRAWS = 10_000
LEVEL = 95.0


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; the bounds are None where there is one image only."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Fair:
    """Shares and relative scores in percent; scores and bias in points of the judge's scale.

    `place_bias` is how much more an answer gets in the first place than in the second; `contradicted` the share of questions whose two
    orders name different winners.
    """

    questions: int
    images: int
    won: Estimate
    tied: Estimate
    lost: Estimate
    reference_score: Estimate
    model_score: Estimate
    mean_of_ratios: Estimate
    ratio_of_means: Estimate
    place_bias: Estimate
    contradicted: Estimate


def compare_fairly(items: Sequence[Item], forward: Scores, swapped: Scores) -> Fair | None:
    """Over the questions that both orders have scores for; None if there are none."""
    both = [item for item in items if item.id in forward and item.id in swapped]
    if not both:
        return None
    # [questions, order, (reference, model)]: the reference stands first in order 0 and second in order 1.
    s = np.array([[forward[i.id], swapped[i.id]] for i in both], np.float64)
    sign = np.sign(s[:, :, 1] - s[:, :, 0])
    won, lost = (sign > 0).all(1), (sign < 0).all(1)
    reference, model = s[:, :, 0].sum(1) / 2, s[:, :, 1].sum(1) / 2
    bias = ((s[:, 0, 0] - s[:, 1, 0]) + (s[:, 1, 1] - s[:, 0, 1])) / 2
    draw = _Draws([item.image for item in both])
    ones = np.ones(len(both))
    return Fair(
        questions=len(both),
        images=draw.images,
        won=draw.ratio(100.0 * won, ones),
        tied=draw.ratio(100.0 * ~(won | lost), ones),
        lost=draw.ratio(100.0 * lost, ones),
        reference_score=draw.ratio(reference, ones),
        model_score=draw.ratio(model, ones),
        mean_of_ratios=draw.ratio(100.0 * (s[:, :, 1] / s[:, :, 0]).sum(1) / 2, ones),
        ratio_of_means=draw.ratio(100.0 * model, reference),
        place_bias=draw.ratio(bias, ones),
        contradicted=draw.ratio(100.0 * (sign[:, 0] * sign[:, 1] < 0), ones),
    )


class _Draws:
    """Bootstrap over groups: how often each is drawn, DRAWS times."""

    def __init__(self, groups: Sequence[str]) -> None:
        names = {name: number for number, name in enumerate(dict.fromkeys(groups))}
        self.images = len(names)
        self._group = np.array([names[g] for g in groups])
        rng = np.random.default_rng(0)
        self._counts = rng.multinomial(self.images, np.full(self.images, 1 / self.images), DRAWS).astype(np.float64)

    def ratio(self, above: ArrayLike, below: ArrayLike) -> Estimate:
        """Σ above / Σ below with its interval."""
        value = float(np.sum(above) / np.sum(below))
        if self.images < 2:
            return Estimate(value, None, None)
        drawn = (self._counts @ self._sums(above)) / (self._counts @ self._sums(below))
        low, high = np.percentile(drawn, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
        return Estimate(value, float(low), float(high))

    def _sums(self, values: ArrayLike) -> F64:
        return np.bincount(self._group, np.asarray(values, np.float64), self.images).astype(np.float64)
