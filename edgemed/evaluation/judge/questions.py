"""Questions with a reference answer, and a model's answers to them, paired by id.

    items = load_items(Path("llava_med_eval_qa50_qa.jsonl"), Path("answers.jsonl"), PROTOCOLS["v1.5"])

Questions are JSON lines with question_id, text, gpt4_answer, fig_label, fig_caption, in_text_mention, type and domain (LLaVA-Med's qa50
file, which the user brings); answers are the seed's prediction lines, of which question_id and text are read. LLaVA-Med pairs by
position, so that one lost line shifts all that follow; here the ids must agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.core.errors import DatasetError
from edgemed.core.files import found_at, os_errors
from edgemed.evaluation.judge.protocol import Protocol, question_text

NEEDED = ("question_id", "text", "gpt4_answer", "fig_label", "fig_caption", "in_text_mention", "type", "domain")
# A question belongs to the first of these that its row says is true; the order decides, since some have several.
DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")
_SHOWN_IDS = 5


@dataclass(frozen=True)
class Item:
    """One question to be judged. `image` groups questions that are not independent of one another."""

    id: str
    row: Mapping[str, Any]
    question: str
    reference: str
    answer: str
    type: str
    domain: str | None
    image: str


def load_items(questions: Path, answers: Path, protocol: Protocol, limit: int | None = None) -> list[Item]:
    """All questions (or the first so many) with their answers, in the questions' order. Raises DatasetError."""
    everything = read_rows(questions, NEEDED)
    rows = dict(list(everything.items())[:limit])
    given = {key: _text(row, answers, key) for key, row in read_rows(answers, ("question_id", "text")).items()}
    _check_ids(questions, list(rows), answers, [key for key in given if key in rows or key not in everything])
    return [_item(key, row, given[key], protocol, questions) for key, row in rows.items()]


def check_questions(questions: Path, protocol: Protocol, limit: int | None = None) -> None:
    """That every question has what it is judged by, before hours go into answers. Raises DatasetError."""
    for key, row in list(read_rows(questions, NEEDED).items())[:limit]:
        _item(key, row, "", protocol, questions)


def read_rows(path: Path, needed: Sequence[str]) -> dict[str, dict[str, Any]]:
    """JSON lines by question_id. Raises DatasetError for a missing file or field, a broken line, an id that comes twice."""
    if not path.is_file():
        raise DatasetError(f"Expected the file {path}, found {found_at(path)}.", "Check the path.")
    found: dict[str, dict[str, Any]] = {}
    for number, row in _lines(path):
        missing = [name for name in needed if name not in row]
        if missing:
            raise DatasetError(f"Expected {', '.join(missing)} in line {number} of {path.name}, found none.", "Correct the file.")
        key = str(row["question_id"])
        if key in found:
            raise DatasetError(f"Expected each question once in {path.name}, found {key} again in line {number}.", "Correct the file.")
        found[key] = row
    if not found:
        raise DatasetError(f"Expected lines with a question_id in {path}, found an empty file.", "Check the path.")
    return found


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with os_errors(path):
        data = path.read_bytes()
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"Expected JSON in line {number} of {path.name}, found something else ({error}).", "Copy it.") from error
        if not isinstance(row, dict):
            raise DatasetError(f"Expected an object in line {number} of {path.name}, found {type(row).__name__}.", "Check the file.")
        yield number, row


def _text(row: Mapping[str, Any], path: Path, key: str, field: str = "text") -> str:
    value = row[field]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DatasetError(f"Expected text as '{field}' of {key} in {path.name}, found {type(value).__name__}.", "Correct the file.")
    return str(value)


def _check_ids(questions: Path, wanted: Sequence[str], answers: Path, given: Sequence[str]) -> None:
    lost, strange = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if lost or strange:
        said = [_some(ids, what) for ids, what in ((lost, "without an answer"), (strange, "that are not asked there")) if ids]
        raise DatasetError(
            f"Expected the {len(wanted)} questions of {questions.name} in {answers.name}, found {' and '.join(said)}.",
            "Name the answers to these questions.",
        )


def _some(ids: Sequence[str], what: str) -> str:
    return f"{len(ids)} {what} ({', '.join(ids[:_SHOWN_IDS])}{' …' if len(ids) > _SHOWN_IDS else ''})"


def _item(key: str, row: Mapping[str, Any], answer: str, protocol: Protocol, path: Path) -> Item:
    domains = row["domain"]
    if not isinstance(domains, Mapping):
        raise DatasetError(f"Expected an object as 'domain' of {key} in {path.name}, found {type(domains).__name__}.", "Correct the file.")
    return Item(
        id=key,
        row=row,
        question=question_text(row, protocol),
        reference=_text(row, path, key, "gpt4_answer"),
        answer=answer,
        type=str(row["type"]),
        domain=next((name for name in DOMAINS if domains.get(name)), None),
        image=str(row.get("pair_id") or row.get("image") or key),
    )
