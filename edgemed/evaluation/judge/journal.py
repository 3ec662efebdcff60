"""A judge's replies on disk, one line each, flushed as they come, so that a killed run goes on where it stopped.

    with open_journal(folder, header) as journal:
        journal.kept                        # reviews of an earlier run of the same thing
        journal.add(review)
    journal.settle(order)                   # at the end: the same lines in the questions' order, whichever run asked what

The first line tells what was asked of whom; a journal of something else is refused and left alone. A last line that was cut off by a
kill is dropped.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgemed.core.errors import DatasetError, InputError
from edgemed.core.files import os_errors, save_bytes

SCHEMA_VERSION = 1
NAME = "reviews.jsonl"
Key = tuple[str, bool]
_HINT = "Choose another folder with --out."


@dataclass(frozen=True)
class Review:
    """One reply about one question in one order. `scores` are (reference, model); None with a reason in `why`."""

    question_id: str
    swapped: bool
    prompt_sha256: str
    reply: str
    scores: tuple[float, float] | None
    why: str
    attempts: int
    prompt_tokens: int | None
    new_tokens: int | None

    @property
    def key(self) -> Key:
        return self.question_id, self.swapped


def _line(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"


class Journal:
    """An open journal. Use `open_journal`."""

    def __init__(self, path: Path, header: Mapping[str, Any], kept: Mapping[Key, Review], stream: BinaryIO) -> None:
        self.kept = dict(kept)
        self._path, self._header, self._stream = path, header, stream
        self._lock = threading.Lock()

    def add(self, review: Review) -> None:
        """Write a line, down to the disk; from any thread. Raises ResourceError."""
        with self._lock, os_errors(self._path):
            self._stream.write(_line(asdict(review)))
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self.kept[review.key] = review

    def settle(self, order: Sequence[Key]) -> None:
        """Rewrite in `order`, whole or not at all; what an earlier run asked beyond that follows, sorted."""
        self._stream.close()
        keys = [*(key for key in order if key in self.kept), *sorted(set(self.kept) - set(order))]
        lines = [_line(self._header), *(_line(asdict(self.kept[key])) for key in keys)]
        save_bytes(self._path, b"".join(lines))


@contextmanager
def open_journal(folder: Path, header: Mapping[str, Any]) -> Iterator[Journal]:
    """The folder's journal, made where there is none. Raises InputError for one of something else, DatasetError for a damaged one."""
    path = folder / NAME
    header = {"schema_version": SCHEMA_VERSION, "kind": "judge reviews"} | dict(header)
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    kept, good_bytes = _read(path, header) if path.is_file() else ({}, 0)
    with os_errors(path):
        stream = path.open("r+b" if path.is_file() else "w+b")
    with stream:
        with os_errors(path):
            stream.truncate(good_bytes)
            stream.seek(good_bytes)
            if good_bytes == 0:
                stream.write(_line(header))
                stream.flush()
        yield Journal(path, header, kept, stream)


def _read(path: Path, header: Mapping[str, Any]) -> tuple[dict[Key, Review], int]:
    """Reviews by key (the last of several counts), and how many bytes of the file are whole lines."""
    with os_errors(path):
        data = path.read_bytes()
    good_bytes = data.rfind(b"\n") + 1
    lines = data[:good_bytes].splitlines()
    if not lines:
        return {}, 0
    rows = [_row(line, number, path) for number, line in enumerate(lines, 1)]
    _check_header(rows[0], header, path)
    try:
        reviews = [Review(**row | {"scores": tuple(row["scores"]) if row["scores"] else None}) for row in rows[1:]]
    except (TypeError, KeyError) as error:
        raise DatasetError(f"Expected reviews in {path}, found other lines ({error}).", _HINT) from error
    return {review.key: review for review in reviews}, good_bytes


def _row(line: bytes, number: int, path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"Expected JSON in line {number} of {path}, found something else.", _HINT) from error
    if not isinstance(row, dict):
        raise DatasetError(f"Expected an object in line {number} of {path}, found something else.", _HINT)
    return row


def _check_header(found: Mapping[str, Any], header: Mapping[str, Any], path: Path) -> None:
    for name, wanted in header.items():
        if found.get(name) != wanted:
            raise InputError(
                f"Expected {path} to be of the {name.replace('_', ' ')} '{wanted}', found '{found.get(name)}'.",
                _HINT,
            )
