"""From answers to results: every protocol, by modality and organ, whether the model looked, and how sure it was.

    result = build_result(samples, texts, scores, views={"blank": other_texts})
    asdict(result)          # what `edgemed eval --json` prints of it

Knows no target: answers may come from a model or from a prediction file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from edgemed.data.samples import Sample, hash_samples
from edgemed.evaluation.confidence import Judged, Study, study
from edgemed.evaluation.metrics import Scores, closed_match, open_recall, score, words
from edgemed.evaluation.protocols import Measure, Scored, is_right, measure, score_strict, summarise

Table = dict[str, dict[str, Measure]]
_UNNAMED = "not told"


@dataclass(frozen=True)
class Answer:
    """One question's answer; `points` is 0 to 1, None where the set does not tell the type of the question."""

    id: str
    question: str
    answer_type: str
    reference: str
    prediction: str
    points: float | None
    score: float | None = None


@dataclass(frozen=True)
class Look:
    """The same questions before another image: strict means there, and the share of answers that read the same as before."""

    same: Measure
    strict: dict[str, Measure]


@dataclass(frozen=True)
class Result:
    """What a model did on a set. Means in percent; `unknown` are ids by the set's own word for their type, `failed` by what went wrong."""

    scores: Scores
    protocols: Table
    by_modality: Table
    by_organ: Table
    looks: dict[str, Look]
    confidence: Study | None
    unknown: dict[str, list[str]]
    failed: dict[str, list[str]]
    samples_sha256: str
    answers: tuple[Answer, ...] = field(repr=False, default=())


def build_result(
    samples: Sequence[Sample],
    texts: Sequence[str],
    scores: Sequence[float | None],
    views: Mapping[str, Sequence[str]] | None = None,
    errors: Sequence[str] = (),
) -> Result:
    """Score answers in the samples' order; `views` are the answers before other images, `errors` what went wrong, or empty."""
    rows = [Scored(s.answer_type, s.question, text, s.answer) for s, text in zip(samples, texts, strict=True)]
    images = [image_name(s) for s in samples]
    judged = judge_answers(samples, texts, scores)
    return Result(
        scores=score((r.answer_type, r.prediction, r.reference) for r in rows),
        protocols=summarise(rows, images),
        by_modality=_breakdown(rows, images, [s.modality for s in samples]),
        by_organ=_breakdown(rows, images, [s.organ for s in samples]),
        looks={view: _look(rows, others, images) for view, others in (views or {}).items()},
        confidence=study(judged) if judged else None,
        unknown=_by_word([(s.native_type or "none", s.id) for s in samples if s.answer_type == "unknown"]),
        failed=_by_word([(error, s.id) for s, error in zip(samples, errors, strict=False) if error]),
        samples_sha256=hash_samples(samples),
        answers=tuple(_answer(s, text, sure) for s, text, sure in zip(samples, texts, scores, strict=True)),
    )


def image_name(sample: Sample) -> str:
    """What tells one image from another; a question without one stands for itself."""
    return str(sample.image) if sample.image else sample.id


def judge_answers(samples: Sequence[Sample], texts: Sequence[str], scores: Sequence[float | None]) -> list[Judged]:
    """What calibration is fitted on: answers with a score to questions whose type is known."""
    out = []
    for sample, text, sure in zip(samples, texts, scores, strict=True):
        right = is_right(Scored(sample.answer_type, sample.question, text, sample.answer))
        if right is not None and sure is not None:
            # Halves are told by folder and name, not by where the set lies on this machine.
            image = "/".join(sample.image.parts[-2:]) if sample.image else sample.id
            out.append(Judged(sure, right, image))
    return out


def _answer(sample: Sample, text: str, sure: float | None) -> Answer:
    points = None
    if sample.answer_type != "unknown":
        points = float(closed_match(text, sample.answer)) if sample.answer_type == "closed" else open_recall(text, sample.answer)
    return Answer(sample.id, sample.question, sample.answer_type, sample.answer, text, points, sure)


def _breakdown(rows: Sequence[Scored], images: Sequence[str], words_of: Sequence[str]) -> Table:
    """Strict means for each word of a set; empty where it has none."""
    if not any(words_of):
        return {}
    out = {}
    for word in sorted(set(words_of)):
        places = [k for k, found in enumerate(words_of) if found == word]
        out[word or _UNNAMED] = measure([score_strict(rows[k]) for k in places], [images[k] for k in places])
    return out


def _look(rows: Sequence[Scored], others: Sequence[str], images: Sequence[str]) -> Look:
    same = [{"same": float(words(row.prediction) == words(text))} for row, text in zip(rows, others, strict=True)]
    strict = [score_strict(Scored(r.answer_type, r.question, text, r.reference)) for r, text in zip(rows, others, strict=True)]
    return Look(measure(same, images)["same"], measure(strict, images))


def _by_word(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    out: dict[str, list[str]] = {}
    for word, id in pairs:
        out.setdefault(word, []).append(id)
    return out
