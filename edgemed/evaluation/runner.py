"""Ask an engine every question of a set, and score the answers.

    evaluation = evaluate(engine, load_samples("slake", path, "validate"))
    evaluation.scores.closed, evaluation.scores.open

Greedy, one question after another; questions about one image follow one another as the set has them, so that the engine reuses what
it knows of it. Knows no files but the images that the samples name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgemed.core.images import ImagePreparation
from edgemed.data.samples import Sample, hash_samples
from edgemed.evaluation.metrics import Scores, closed_match, open_recall, score
from runtimes.engine import Engine, prepare_image
from runtimes.messages import PreparedImage

# Answers of these sets are a few words.
MAX_TOKENS = 24


@dataclass(frozen=True)
class Answer:
    """One question's answer; `points` is 0 to 1, None where the set does not tell the type of the question."""

    id: str
    question: str
    answer_type: str
    reference: str
    prediction: str
    points: float | None


@dataclass(frozen=True)
class Evaluation:
    """Scores in percent, each answer, and which samples they are about."""

    scores: Scores
    answers: tuple[Answer, ...]
    samples_sha256: str
    blank: bool
    elapsed_s: float


def evaluate(
    engine: Engine,
    samples: Sequence[Sample],
    *,
    blank: bool = False,
    max_tokens: int = MAX_TOKENS,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Answer and score. `blank` shows the padding colour instead of each image. Raises ImageError and what the engine raises."""
    begun = time.monotonic()
    answers = []
    for sample in samples:
        answers.append(_answer(engine, sample, blank, max_tokens))
        if progress:
            progress(len(answers), len(samples))
    return Evaluation(
        scores=score((a.answer_type, a.prediction, a.reference) for a in answers),
        answers=tuple(answers),
        samples_sha256=hash_samples(samples),
        blank=blank,
        elapsed_s=time.monotonic() - begun,
    )


def _answer(engine: Engine, sample: Sample, blank: bool, max_tokens: int) -> Answer:
    images = []
    if sample.image is not None:
        images = [blank_image(engine.artifact.manifest.image) if blank else prepare_image(engine.artifact, sample.image)]
    prediction = engine.ask(sample.turns[:-1], images, max_tokens=max_tokens).text
    return Answer(
        id=sample.id,
        question=sample.question,
        answer_type=sample.answer_type,
        reference=sample.answer,
        prediction=prediction,
        points=_points(sample, prediction),
    )


def _points(sample: Sample, prediction: str) -> float | None:
    if sample.answer_type == "unknown":
        return None
    return float(closed_match(prediction, sample.answer)) if sample.answer_type == "closed" else open_recall(prediction, sample.answer)


def blank_image(preparation: ImagePreparation) -> PreparedImage:
    """An image of nothing but the padding colour: what a model answers without seeing."""
    return PreparedImage(bytes(preparation.pad_colour) * preparation.size_px**2, preparation.size_px)
