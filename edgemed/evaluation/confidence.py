"""How sure an answer is: from its tokens' probabilities to how often such answers are right, and from where on to refer.

    judged = [Judged(score, right, image), …]                 # score: core.calibration.score_of
    report = study(judged)                                    # on halves that were not fitted: calibration error, curve, referral rule
    calibration = build_calibration(judged, report, …)        # on all of them, for calibration.json

Three maps are tried: the score itself, Platt's logistic curve on the score's logit (Platt 1999), and isotonic regression (Zadrozny
and Elkan, 2002). The one with the least expected calibration error (Guo et al. 2017, arXiv 1706.04599; here bins of equal mass) on
halves of the images that it was not fitted on is kept.

The referral rule is Learn then Test (Angelopoulos et al. 2021, arXiv 2110.01052, algorithm 1: fixed-sequence testing from several starts
with binomial p-values), the member of the conformal family for risks that do not fall steadily: selective error is one. Thresholds are
a fixed grid, so that nothing is chosen by the data that they are tested on. It holds for questions that are drawn like these and
independently; questions about one image are not independent, which no bound here accounts for.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgemed.core.calibration import Calibration

F64 = NDArray[np.float64]
Points = tuple[tuple[float, float], ...]

RISK = 0.1
CONFIDENCE = 0.9
BINS = 10
# Coverages at which accuracy is told.
COVERAGES = tuple(k / 10 for k in range(10, 0, -1))
# Thresholds on the score, strictest first, fixed before any data is seen: steps of 0.05 in its logit, from 0.9999 down, then 0.
GRID = (*(1 / (1 + math.exp(-x / 20)) for x in range(184, -61, -1)), 0.0)
STARTS = 4
_CLIP = 1e-6
GUARANTEE = (
    "With {confidence:.0%} confidence over the choice of the calibration questions, at most {risk:.0%} of the answers that are not "
    "referred are wrong, for questions drawn independently from where these come from (Learn then Test, arXiv 2110.01052)."
)


@dataclass(frozen=True)
class Judged:
    """An answer's score in [0, 1], whether it was right, and the image it is about."""

    score: float
    right: bool
    image: str


@dataclass(frozen=True)
class Referral:
    """A rule and what it did on answers it was not chosen on: how many it let through, the share wrong among them with a 95 % interval."""

    answered: int
    asked: int
    wrong_percent: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Study:
    """What halves that were not fitted say. ECE in [0, 1]; the curve is (coverage, accuracy in percent), most certain answers first."""

    questions: int
    ece: dict[str, float]
    method: str
    curve: tuple[tuple[float, float], ...]
    referral: Referral


# -- maps from score to probability -------------------------------------------------------------------------------------


def fit_identity(scores: F64, right: F64) -> Points:
    """The score as it is."""
    return ((0.0, 0.0), (1.0, 1.0))


def fit_platt(scores: F64, right: F64) -> Points:
    """A logistic curve on the score's logit, by Newton's method with Platt's softened targets; sampled as points."""
    x = _logit(scores)
    positives = right.sum()
    targets = np.where(right > 0, (positives + 1) / (positives + 2), 1 / (len(right) - positives + 2))
    design = np.stack([x, np.ones_like(x)], axis=1)
    weights = np.zeros(2)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(design @ weights, -30, 30)))
        hessian = design.T @ (design * (p * (1 - p))[:, None]) + 1e-6 * np.eye(2)
        step = np.linalg.solve(hessian, design.T @ (p - targets))
        weights -= step
        if float(np.abs(step).max()) < 1e-9:
            break
    grid = np.unique(np.round(1 / (1 + np.exp(-np.linspace(-6, 9, 61))), 6))
    # A curve that falls would say that the model is the less right the surer it is: then the score tells nothing.
    slope, offset = (weights[0], weights[1]) if weights[0] > 0 else (0.0, float(_logit(np.array([right.mean()]))[0]))
    return tuple((float(s), float(1 / (1 + math.exp(-(slope * z + offset))))) for s, z in zip(grid, _logit(grid), strict=True))


def fit_isotonic(scores: F64, right: F64) -> Points:
    """Isotonic regression by pooling adjacent violators; a point at each block's mean score."""
    order = np.argsort(scores, kind="stable")
    blocks: list[list[float]] = []  # Σ right, Σ score, count
    for score, hit in zip(scores[order], right[order], strict=True):
        if blocks and score * blocks[-1][2] == blocks[-1][1]:
            blocks[-1] = [blocks[-1][0] + hit, blocks[-1][1] + score, blocks[-1][2] + 1]
        else:
            blocks.append([float(hit), float(score), 1.0])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][2] >= blocks[-1][0] * blocks[-2][2]:
            last = blocks.pop()
            blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
    points: dict[float, float] = {min(1.0, round(s / n, 6)): hits / n for hits, s, n in blocks}
    return tuple(sorted(points.items()))


FITS: dict[str, Callable[[F64, F64], Points]] = {"score": fit_identity, "platt": fit_platt, "isotonic": fit_isotonic}


def _logit(values: F64) -> F64:
    p = np.clip(values, _CLIP, 1 - _CLIP)
    out: F64 = np.log(p) - np.log1p(-p)
    return out


def apply_points(points: Points, scores: F64) -> F64:
    """Probabilities, as core.calibration.Calibration.probability gives them."""
    x, y = zip(*points, strict=True)
    return np.asarray(np.interp(scores, x, y), np.float64)


def calibration_error(probabilities: F64, right: F64, bins: int = BINS) -> float:
    """Expected calibration error: Σ share of bin × |mean probability − share right|, over bins of equal mass."""
    order = np.argsort(probabilities, kind="stable")
    parts = [part for part in np.array_split(order, min(bins, len(order))) if len(part)]
    return float(sum(len(p) * abs(probabilities[p].mean() - right[p].mean()) for p in parts) / len(order))


# -- when to refer ------------------------------------------------------------------------------------------------------


def binomial_tail(wrong: int, n: int, share: float) -> float:
    """P(X ≤ wrong) for X ~ Binomial(n, share)."""
    ways = (math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(wrong + 1))
    logs = (way + k * math.log(share) + (n - k) * math.log1p(-share) for k, way in enumerate(ways))
    return min(1.0, math.fsum(math.exp(x) for x in logs))


def choose_threshold(scores: F64, right: F64, risk: float = RISK, confidence: float = CONFIDENCE) -> float:
    """The least score that need not be referred; 1.0 (refer all) where no threshold can be shown to be good enough."""
    level = (1 - confidence) / STARTS
    best = 1.0
    for start in range(0, len(GRID), math.ceil(len(GRID) / STARTS)):
        for threshold in GRID[start:]:
            kept = scores >= threshold
            n = int(kept.sum())
            if binomial_tail(int(n - right[kept].sum()), n, risk) > level:
                break
            best = min(best, threshold)
    return best


def clopper_pearson(wrong: int, n: int) -> tuple[float, float]:
    """The exact 95 % interval of a share, by bisection."""

    def solve(tail: Callable[[float], float]) -> float:
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if tail(middle) > 0.025 else (low, middle)
        return low

    upper = 1.0 if wrong == n else solve(lambda p: binomial_tail(wrong, n, p) if 0 < p < 1 else float(p == 0))
    lower = 0.0 if wrong == 0 else 1 - solve(lambda q: binomial_tail(n - wrong, n, q) if 0 < q < 1 else float(q == 0))
    return lower, upper


# -- the study ----------------------------------------------------------------------------------------------------------


def in_first_half(image: str) -> bool:
    """Images are halved by a hash of their name, so that both halves' questions are about other images."""
    return hashlib.sha256(image.encode()).digest()[0] % 2 == 0


def study(judged: Sequence[Judged], risk: float = RISK) -> Study | None:
    """Fit on one half, look at the other, and the other way round. None where a half is empty."""
    halves = [[j for j in judged if in_first_half(j.image) is first] for first in (True, False)]
    if not all(halves):
        return None
    arrays = [_arrays(half) for half in halves]
    ece = {name: _crossed_error(fit, arrays) for name, fit in FITS.items()}
    return Study(
        questions=len(judged),
        ece=ece,
        method=min(ece, key=lambda name: ece[name]),
        curve=_curve(*_arrays(judged)),
        referral=_crossed_referral(arrays, risk),
    )


def _arrays(judged: Sequence[Judged]) -> tuple[F64, F64]:
    return np.array([j.score for j in judged]), np.array([float(j.right) for j in judged])


def _crossed_error(fit: Callable[[F64, F64], Points], halves: Sequence[tuple[F64, F64]]) -> float:
    errors = [calibration_error(apply_points(fit(*halves[1 - k]), scores), right) for k, (scores, right) in enumerate(halves)]
    return float(np.average(errors, weights=[len(right) for _, right in halves]))


def _curve(scores: F64, right: F64) -> tuple[tuple[float, float], ...]:
    order = np.argsort(-scores, kind="stable")
    return tuple((c, float(100 * right[order[: max(1, round(c * len(order)))]].mean())) for c in COVERAGES)


def _crossed_referral(halves: Sequence[tuple[F64, F64]], risk: float) -> Referral:
    answered = wrong = 0
    for k, (scores, right) in enumerate(halves):
        threshold = choose_threshold(*halves[1 - k], risk)
        kept = scores >= threshold if threshold < 1 else np.zeros(len(scores), bool)
        answered += int(kept.sum())
        wrong += int(kept.sum() - right[kept].sum())
    asked = sum(len(right) for _, right in halves)
    if not answered:
        return Referral(0, asked, None, None, None)
    low, high = clopper_pearson(wrong, answered)
    return Referral(answered, asked, 100 * wrong / answered, 100 * low, 100 * high)


def build_calibration(
    judged: Sequence[Judged], report: Study, on: str, model_sha256: str, split_sha256: str, risk: float = RISK
) -> Calibration:
    """What goes beside the manifest: the map and the threshold from all answers, and what the halves said of their like."""
    scores, right = _arrays(judged)
    return Calibration(
        calibrated_on=on,
        points=FITS[report.method](scores, right),
        refer_score_below=choose_threshold(scores, right, risk),
        model_sha256=model_sha256,
        split_sha256=split_sha256,
        method=report.method,
        held_out_ece=report.ece[report.method],
        questions=len(judged),
        risk=risk,
        confidence=CONFIDENCE,
        guarantee=GUARANTEE.format(confidence=CONFIDENCE, risk=risk),
    )
