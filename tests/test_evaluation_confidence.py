"""Calibration and the referral rule: against closed forms, on made-up answers whose truth is known, and the file beside the manifest."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from edgemed.core.calibration import CALIBRATION_NAME, Calibration, load_calibration, save_calibration
from edgemed.core.errors import ArtifactError
from edgemed.core.files import sha256_file
from edgemed.evaluation.confidence import (
    FITS,
    GRID,
    Judged,
    apply_points,
    binomial_tail,
    build_calibration,
    calibration_error,
    choose_threshold,
    clopper_pearson,
    fit_isotonic,
    fit_platt,
    in_first_half,
    study,
)


def answers(count: int, power: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores, and whether each was right, with probability score^power."""
    rng = np.random.default_rng(seed)
    scores = rng.beta(5, 1, count)
    return scores, (rng.random(count) < scores**power).astype(float)


def test_isotonic_pools_what_falls() -> None:
    points = fit_isotonic(np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.0, 1.0, 0.0, 1.0]))
    assert points == ((0.1, 0.0), (0.25, 0.5), (0.4, 1.0))


@pytest.mark.parametrize("name", ["platt", "isotonic"])
def test_a_fitted_map_tells_how_often_answers_are_right(name: str) -> None:
    points = FITS[name](*answers(20_000, 3, 0))
    grid = np.array([0.5, 0.7, 0.9])
    assert apply_points(points, grid) == pytest.approx(grid**3, abs=0.05)
    assert all(a[0] < b[0] and a[1] <= b[1] for a, b in zip(points, points[1:], strict=False))
    test = answers(20_000, 3, 1)
    assert calibration_error(apply_points(points, test[0]), test[1]) < 0.02 < calibration_error(*test)


def test_a_score_that_tells_nothing_becomes_the_mean() -> None:
    scores = np.linspace(0.1, 0.9, 100)
    points = fit_platt(scores, (scores < 0.5).astype(float))  # the surer, the more often wrong
    assert apply_points(points, scores) == pytest.approx(np.full(100, 0.5), abs=1e-6)


def test_calibration_error_is_the_distance_in_each_bin() -> None:
    assert calibration_error(np.full(10, 0.7), np.array([1.0] * 5 + [0.0] * 5), bins=1) == pytest.approx(0.2)
    assert calibration_error(np.array([0.0, 1.0]), np.array([0.0, 1.0])) == 0.0


def test_binomial_bounds_against_closed_forms() -> None:
    exact = sum(math.comb(20, k) * 0.1**k * 0.9 ** (20 - k) for k in range(3))
    assert binomial_tail(2, 20, 0.1) == pytest.approx(exact)
    assert binomial_tail(0, 0, 0.1) == 1.0
    # No errors in n: the upper bound is 1 - 0.025^(1/n).
    assert clopper_pearson(0, 30) == pytest.approx((0.0, 1 - 0.025 ** (1 / 30)))
    assert clopper_pearson(30, 30) == pytest.approx((0.025 ** (1 / 30), 1.0))
    low, high = clopper_pearson(3, 50)
    assert binomial_tail(3, 50, high) == pytest.approx(0.025) and 1 - binomial_tail(2, 50, low) == pytest.approx(0.025)


def test_the_rule_refers_all_where_nothing_can_be_shown() -> None:
    assert choose_threshold(np.full(10, 0.99), np.ones(10)) == 1.0
    assert choose_threshold(np.full(200, 0.99), np.zeros(200)) == 1.0
    assert choose_threshold(np.full(200, 0.5), np.ones(200)) == 0.0
    assert all(a > b for a, b in zip(GRID, GRID[1:], strict=False))


def test_the_rule_keeps_its_promise() -> None:
    """Drawn anew 200 times, more than 10 % wrong among what is answered comes in at most one of ten draws (and it answers something)."""
    broken = used = 0
    truth = answers(200_000, 2, 99)[0]
    for seed in range(200):
        threshold = choose_threshold(*answers(600, 2, seed))
        kept = truth[truth >= threshold]
        used += threshold < 1
        broken += threshold < 1 and float((1 - kept**2).mean()) > 0.1
    assert broken <= 20 and used >= 100


def test_the_study_looks_at_images_that_were_not_fitted() -> None:
    scores, right = answers(900, 2, 5)
    judged = [Judged(float(s), bool(r), f"image{k // 9}") for k, (s, r) in enumerate(zip(scores, right, strict=True))]
    report = study(judged)
    assert report is not None and report.method in ("platt", "isotonic") and report.ece[report.method] < report.ece["score"]
    assert report.curve[0][0] == 1.0 and report.curve[0][1] == pytest.approx(100 * right.mean())
    assert report.curve[-1][1] > report.curve[0][1]
    assert report.referral.asked == 900
    one_half = [j for j in judged if in_first_half(j.image)]
    assert 0 < len(one_half) < 900 and study(one_half) is None


def build(folder: Path) -> Calibration:
    (folder / "manifest.json").write_text("{}")
    scores, right = answers(900, 1, 6)
    judged = [Judged(float(s), bool(r), f"image{k // 9}") for k, (s, r) in enumerate(zip(scores, right, strict=True))]
    report = study(judged)
    assert report is not None
    return build_calibration(judged, report, "made up", sha256_file(folder / "manifest.json"), "0" * 64)


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    calibration = build(tmp_path)
    save_calibration(tmp_path, calibration)
    assert load_calibration(tmp_path) == calibration
    assert calibration.guarantee is not None and "2110.01052" in calibration.guarantee
    threshold = calibration.refer_score_below
    assert threshold is not None and 0 < threshold < 1
    assert calibration.refers(threshold - 1e-9) and not calibration.refers(threshold)
    assert calibration.model_copy(update={"refer_score_below": 1.0}).refers(1.0)


def test_another_models_calibration_is_refused(tmp_path: Path) -> None:
    save_calibration(tmp_path, build(tmp_path))
    (tmp_path / "manifest.json").write_text('{"another": "model"}')
    with pytest.raises(ArtifactError, match="found that of"):
        load_calibration(tmp_path)


def test_a_file_without_a_threshold_on_the_score_refers_by_probability(tmp_path: Path) -> None:
    (tmp_path / CALIBRATION_NAME).write_text(json.dumps({"calibrated_on": "x", "refer_below": 0.5, "points": [[0.0, 0.0], [1.0, 1.0]]}))
    calibration = load_calibration(tmp_path)
    assert calibration is not None and calibration.refers(0.4) and not calibration.refers(0.6)
