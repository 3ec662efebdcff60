"""calibration.json beside a model's manifest: how often answers of a given score were right, and from where on to refer.

    calibration = load_calibration(folder)           # None where the file is absent: the model is not calibrated
    probability = calibration.probability(score)

    {"schema_version": 1, "calibrated_on": "slake test, 1061 questions", "refer_below": 0.6,
     "points": [[0.2, 0.31], [0.9, 0.84]]}

A score is the geometric mean of the answer's token probabilities (`score_of`); `points` are (score, share that was right), rising in the
score, joined by straight lines and held level beyond their ends. Whoever measures a model writes the file; nothing here does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from edgemed.core.errors import ArtifactError
from edgemed.core.files import os_errors
from edgemed.core.model import Frozen

CALIBRATION_NAME = "calibration.json"
_HINT = "Calibrate the model again, or remove the file."

Share = Annotated[float, Field(ge=0, le=1)]


class Calibration(Frozen):
    """From an answer's score to the probability that it is right. See the module's text."""

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    calibrated_on: str
    refer_below: Share = 0.0
    points: Annotated[tuple[tuple[Share, Share], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _rising(self) -> Calibration:
        if any(a[0] >= b[0] for a, b in pairwise(self.points)):
            raise ValueError("points must rise in their score")
        return self

    def probability(self, score: float) -> float:
        """The share of answers of this score that were right."""
        if score <= self.points[0][0]:
            return self.points[0][1]
        for (x0, y0), (x1, y1) in pairwise(self.points):
            if score <= x1:
                return y0 + (y1 - y0) * (score - x0) / (x1 - x0)
        return self.points[-1][1]

    def refers(self, probability: float) -> bool:
        """Whether an answer of this probability is to be shown as a case for a specialist."""
        return probability < self.refer_below


def score_of(logprobs: Sequence[float]) -> float | None:
    """The geometric mean of token probabilities; None for an answer without tokens."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else None


def load_calibration(folder: Path) -> Calibration | None:
    """A model's calibration, or None where there is none. Raises ArtifactError where the file is not as described here."""
    path = folder / CALIBRATION_NAME
    if not path.is_file():
        return None
    with os_errors(path):
        data = path.read_bytes()
    try:
        return Calibration.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"Expected a valid calibration in {path}, found a problem at '{where}': {first['msg']}.", _HINT) from error
    except ValueError as error:  # also UnicodeDecodeError
        raise ArtifactError(f"Expected JSON in {path}, found something else.", _HINT) from error
