"""Prediction files as LLaVA's, Med-MoE's and the seed's scripts read and write them: one JSON object a line.

    rows = load_predictions(Path("answers.jsonl"))
    paired = pair(samples, rows)                 # by id; another split's file is refused

    {"question_id": "slake-1", "prompt": "…", "text": "…", "answer_id": "…", "model_id": "…", "metadata": {…}}

The seed's scripts pair by position, so that one lost row shifts all that follow; here ids pair, and files are written in the
data set's order, which suits both. `metadata` of ours holds `tokens_generated` and, where it is known, `score`; a file with the seed's
`inference_time` (s) and `memory_usage` (GB) besides is written beside it, as times never come out the same twice.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgemed.core.errors import DatasetError
from edgemed.core.files import os_errors, save_text
from edgemed.data.samples import Sample

# shortuuid's alphabet and length, which LLaVA's answer ids have.
_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
_ID_LENGTH = 22


@dataclass(frozen=True)
class Prediction:
    """One line of a file."""

    question_id: str
    prompt: str
    text: str
    answer_id: str = ""
    model_id: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def line(self, **more: Any) -> str:
        """As JSON, `more` added to the metadata."""
        row = {
            "question_id": self.question_id,
            "prompt": self.prompt,
            "text": self.text,
            "answer_id": self.answer_id,
            "model_id": self.model_id,
            "metadata": {**self.metadata, **more},
        }
        return json.dumps(row, ensure_ascii=False)


def make_answer_id(*parts: str) -> str:
    """22 letters and digits, the same for the same model and question."""
    number = int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest(), "big")
    letters = []
    for _ in range(_ID_LENGTH):
        number, rest = divmod(number, len(_ALPHABET))
        letters.append(_ALPHABET[rest])
    return "".join(letters)


def save_predictions(path: Path, rows: Sequence[Prediction], more: Sequence[Mapping[str, Any]] | None = None) -> None:
    """Write a file, whole or not at all."""
    extra = more or [{}] * len(rows)
    save_text(path, "".join(row.line(**facts) + "\n" for row, facts in zip(rows, extra, strict=True)))


def load_predictions(path: Path) -> list[Prediction]:
    """Read a file of anybody's. Raises DatasetError where a line is no such row or an id comes twice."""
    with os_errors(path):
        data = path.read_bytes()
    rows = [_read_row(path, number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip()]
    twice = [id for id, count in Counter(row.question_id for row in rows).items() if count > 1]
    if twice:
        raise DatasetError(f"Expected each question once in {path}, found {name_some(twice)} more than once.", "Remove the copies.")
    return rows


def _read_row(path: Path, number: int, line: bytes) -> Prediction:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError
        raise DatasetError(f"Expected a JSON object in line {number} of {path}, found something else.", "Write the file again.") from error
    if not isinstance(row, dict) or "question_id" not in row or not isinstance(row.get("text"), str):
        raise DatasetError(f"Expected question_id and text in line {number} of {path}, found {line[:60]!r}.", "Check the file's format.")
    metadata = row.get("metadata")
    return Prediction(
        str(row["question_id"]),
        str(row.get("prompt", "")),
        row["text"],
        str(row.get("answer_id", "")),
        str(row.get("model_id", "")),
        metadata if isinstance(metadata, dict) else {},
    )


def pair(samples: Sequence[Sample], rows: Sequence[Prediction]) -> list[Prediction]:
    """The predictions in the samples' order. Raises DatasetError where the ids are not the same, as in another split's file."""
    found = {row.question_id: row for row in rows}
    wanted = [sample.id for sample in samples]
    # SLAKE's and others' own ids are bare numbers; ours name the set first.
    named = {_full_id(wanted, id): row for id, row in found.items()}
    if not found.keys() & set(wanted) and named.keys() & set(wanted):
        found = named
    missing = [id for id in wanted if id not in found]
    other = sorted(found.keys() - set(wanted))
    if missing or other:
        raise DatasetError(
            f"Expected predictions for the {len(wanted)} questions of the split, found {len(missing)} without one "
            f"({name_some(missing)}) and {len(other)} for other questions ({name_some(other)}).",
            "Name the split that the predictions were made for.",
        )
    return [found[id] for id in wanted]


def _full_id(wanted: Sequence[str], id: str) -> str:
    prefix = wanted[0].rpartition("-")[0] if wanted else ""
    return f"{prefix}-{id}" if prefix else id


def name_some(ids: Sequence[str], most: int = 5) -> str:
    """A few of many, for a sentence."""
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "") or "none"
