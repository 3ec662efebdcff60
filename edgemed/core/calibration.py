"""calibration.json beside a model's manifest: how often answers of a given score were right, and from where on to refer.

    calibration = load_calibration(folder)           # None where the file is absent: the model is not calibrated
    probability = calibration.probability(score)
    calibration.refers(score)                        # whether the case is one for a clinician

    {"schema_version": 1, "calibrated_on": "slake test, 1061 questions", "refer_score_below": 0.93,
     "points": [[0.2, 0.31], [0.9, 0.84]], "model_sha256": "…", "split_sha256": "…", "method": "isotonic",
     "risk": 0.1, "confidence": 0.9, "guarantee": "…"}

A score is the geometric mean of the answer's token probabilities (`score_of`); `points` are (score, share that was right), rising in the
score, joined by straight lines and held level beyond their ends. `edgemed eval --calibrate` measures a model and writes the file
(edgemed/evaluation/confidence.py); what is beyond `points` may be missing in files that others wrote.
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
from edgemed.core.files import os_errors, save_text, sha256_file
from edgemed.core.manifest import MANIFEST_NAME
from edgemed.core.model import Frozen

CALIBRATION_NAME = "calibration.json"
_HINT = "Calibrate the model again with `edgemed eval --calibrate`, or remove the file."

Share = Annotated[float, Field(ge=0, le=1)]


class Calibration(Frozen):
    """From an answer's score to the probability that it is right. See the module's text."""

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    calibrated_on: str
    points: Annotated[tuple[tuple[Share, Share], ...], Field(min_length=1)]
    # Referred is an answer of a lower score; 1.0: every answer. Where it is missing, one of a lower probability than `refer_below`.
    refer_score_below: Share | None = None
    refer_below: Share = 0.0
    # Of manifest.json, which holds the weights' hashes; and of the questions (edgemed.data.hash_samples).
    model_sha256: str | None = None
    split_sha256: str | None = None
    method: str | None = None
    # Expected calibration error on halves of the images that were not fitted, and how many questions there were.
    held_out_ece: Share | None = None
    questions: int | None = None
    # With `confidence`, at most the share `risk` of what is not referred is wrong; what that holds for and its source.
    risk: Share | None = None
    confidence: Share | None = None
    guarantee: str | None = None

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

    def refers(self, score: float) -> bool:
        """Whether an answer of this score is to be shown as a case for a specialist."""
        if self.refer_score_below is None:
            return self.probability(score) < self.refer_below
        return self.refer_score_below >= 1.0 or score < self.refer_score_below


def score_of(logprobs: Sequence[float]) -> float | None:
    """The geometric mean of token probabilities; None for an answer without tokens."""
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else None


def load_calibration(folder: Path) -> Calibration | None:
    """A model's calibration, or None where there is none. Raises ArtifactError where it is not as described here, or another model's."""
    path = folder / CALIBRATION_NAME
    if not path.is_file():
        return None
    with os_errors(path):
        data = path.read_bytes()
    try:
        calibration = Calibration.model_validate(json.loads(data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ArtifactError(f"Expected a valid calibration in {path}, found a problem at '{where}': {first['msg']}.", _HINT) from error
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise ArtifactError(f"Expected JSON in {path}, found something else.", _HINT) from error
    _check_model(folder, calibration)
    return calibration


def save_calibration(folder: Path, calibration: Calibration) -> Path:
    """Write calibration.json beside the manifest, whole or not at all; its path."""
    path = folder / CALIBRATION_NAME
    save_text(path, calibration.model_dump_json(indent=1, exclude_none=True) + "\n")
    return path


def _check_model(folder: Path, calibration: Calibration) -> None:
    # Another quant's scores mean something else.
    manifest = folder / MANIFEST_NAME
    if calibration.model_sha256 is None or not manifest.is_file():
        return
    with os_errors(manifest):
        found = sha256_file(manifest)
    if found != calibration.model_sha256:
        raise ArtifactError(
            f"Expected the calibration of the model {found[:12]}… in {folder / CALIBRATION_NAME}, "
            f"found that of {calibration.model_sha256[:12]}….",
            _HINT,
        )
