"""The strict metrics on cases worked out by hand."""

from __future__ import annotations

import pytest

from edgemed.core.contract import count_image_tokens
from edgemed.evaluation.metrics import closed_match, open_recall, score


@pytest.mark.parametrize(
    ("prediction", "reference", "match"),
    [
        ("Yes", "yes", True),
        (" yes. ", "Yes", True),
        ("No", "Yes", False),
        ("Normal", "No", False),
        ("Yes, it is", "Yes", False),
        ("", "Yes", False),
    ],
)
def test_closed_is_an_exact_match(prediction: str, reference: str, match: bool) -> None:
    assert closed_match(prediction, reference) is match


@pytest.mark.parametrize(
    ("prediction", "reference", "recall"),
    [
        ("left lung", "Left Lung, Lower Right", 0.5),
        ("right right right right", "right lung", 0.5),
        ("Lung, Heart", "lung heart", 1.0),
        ("anything", "", 0.0),
        ("", "lung", 0.0),
        ("the the", "the the the", 2 / 3),
    ],
)
def test_open_counts_a_word_at_most_as_often_as_the_reference(prediction: str, reference: str, recall: float) -> None:
    assert open_recall(prediction, reference) == pytest.approx(recall)


def test_scores_are_means_per_type() -> None:
    rows = [("closed", "Yes", "Yes"), ("closed", "No", "Yes"), ("open", "liver", "Liver"), ("unknown", "a", "b")]
    result = score(rows)
    assert (result.closed, result.closed_n, result.open, result.open_n) == (50.0, 2, 100.0, 1)
    empty = score([])
    assert empty.closed is None and empty.open is None


@pytest.mark.parametrize(
    ("tower", "strategy", "tokens"),
    [
        ("clip_vision_model", "default", 256),
        ("clip_vision_model", "full", 257),
        ("siglip_vision_model", "full", 256),
        ("siglip_vision_model", "default", 255),
    ],
)
def test_an_images_tokens_are_counted_as_transformers_makes_them(tower: str, strategy: str, tokens: int) -> None:
    assert count_image_tokens(224, 14, tower, strategy) == tokens
