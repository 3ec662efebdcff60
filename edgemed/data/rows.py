"""What all readers share: JSON rows, their fields, answer types, images beside a file. Every problem names file and row.

    for position, row in enumerate(read_rows(path)): field(row, "question", path, position)

`each` reads rows that may be bad: by default the first problem is raised with the count of all; a `problems` list collects them.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from edgemed.core.errors import DatasetError
from edgemed.core.files import found_at, os_errors
from edgemed.data.samples import AnswerType

Row = dict[str, Any]
T = TypeVar("T")
# SLAKE and VQA-RAD write OPEN/CLOSED (VQA-RAD also with a trailing blank), Med-MoE's files open/close.
_TYPES: dict[str, AnswerType] = {
    "open": "open",
    "closed": "closed",
    "close": "closed",
    "yes/no": "closed",
    "other": "open",
    "number": "open",
}
# Files call the same split by different names.
_ALIASES = {"validate": ("validation", "val", "dev"), "validation": ("validate", "val", "dev"), "val": ("validate", "validation", "dev")}
# What a picture is asked for where a set has captions and no questions.
CAPTION_REQUESTS = (
    "Describe this image.",
    "What does this image show?",
    "Explain what can be seen in this image.",
    "Give a short description of this figure.",
    "Summarise the content of this picture.",
    "Please provide a caption for this image.",
)


def split_names(split: str) -> tuple[str, ...]:
    """`split` and what other files call it."""
    return (split, *_ALIASES.get(split, ()))


def find_file(folder: Path, split: str, endings: Sequence[str]) -> Path:
    """The file of a split in `folder`; where there is none, the path it is expected at."""
    candidates = [folder / f"{name}{ending}" for name in split_names(split) for ending in endings]
    return next((path for path in candidates if path.is_file()), candidates[0])


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark. Raises DatasetError."""
    if not path.is_file():
        raise DatasetError(f"Expected the file {path}, found {found_at(path)}.", "Check the data set's folder.")
    with os_errors(path):
        raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DatasetError(f"Expected UTF-8 in {path}, found other bytes at {error.start}.", "Save the file as UTF-8.") from error


def read_json(path: Path) -> Any:
    """A JSON file, or the list of a .jsonl file's lines. Raises DatasetError."""
    text = read_text(path)
    try:
        return [json.loads(line) for line in text.split("\n") if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"Expected JSON in {path}, found something else ({error}).", "Download or copy the file again.") from error


def read_rows(path: Path) -> list[Row]:
    """A JSON list of objects. Raises DatasetError."""
    rows = read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"Expected a list of objects in {path}, found {type(rows).__name__}.", "Check the file's format.")
    return rows


# What a row has beyond its header; no column's name, since those are stripped.
_SURPLUS = " "


def read_table(path: Path) -> list[Row]:
    """A CSV file with a header, its columns separated by commas, semicolons or tabs. Raises DatasetError."""
    text = read_text(path)
    header = text.split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey=_SURPLUS, delimiter=separator, strict=True))
    except csv.Error as error:
        raise DatasetError(f"Expected a CSV table in {path}, found something else ({error}).", "Save it as CSV again.") from error
    for number, row in enumerate(rows, 2):  # as a spreadsheet counts
        more = [cell for cell in row.pop(_SURPLUS, ()) if cell.strip()]
        if more:
            raise DatasetError(
                f"Expected {len(row)} cells in row {number} of {path}, as its first line has, found {len(row) + len(more)}.",
                f"Put a text that has a '{separator}' in it in double quotes.",
            )
    return [{k.strip().lower(): v or "" for k, v in row.items()} for row in rows]


def each(rows: Iterable[T], make: Callable[[int, T], Any | None], path: Path, problems: list[DatasetError] | None = None) -> list[Any]:
    """`make(position, row)` of every row, without those that are None. A DatasetError of `make` goes into `problems` where given."""
    out, found, count = [], [] if problems is None else problems, 0
    for position, row in enumerate(rows):
        count += 1
        try:
            made = make(position, row)
        except DatasetError as error:
            found.append(error)
            continue
        if made is not None:
            out.append(made)
    if found and problems is None:
        more = f" {len(found)} of {count} rows of {path.name} cannot be read." if len(found) > 1 else ""
        raise DatasetError(found[0].message + more, found[0].hint)
    return out


def field(row: Row, key: str, path: Path, position: int) -> str:
    """A field as text: numbers spelled out, lists joined by commas. Raises DatasetError where it is missing or nothing."""
    value = row.get(key)
    if value is None:
        found = f"nothing in it ({key}: null)" if key in row else ", ".join(row)
        raise DatasetError(f"Expected the field '{key}' in row {position} of {path}, found {found}.", "Check the file's format.")
    return plain(value)


def plain(value: Any) -> str:
    """An answer as text, whatever JSON type it has."""
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    return str(value).strip()


def answer_type(value: str, answer: str = "") -> AnswerType:
    """A set's own word, or where it has none: closed for a plain yes or no."""
    if value.strip():
        return _TYPES.get(value.strip().lower(), "unknown")
    return literal_type(answer) if answer else "unknown"


def literal_type(answer: str) -> AnswerType:
    """Closed for a plain yes or no, else open: for files that do not say (PathVQA's rule, and what HF exports are left with)."""
    return "closed" if answer.strip().strip(".").lower() in ("yes", "no") else "open"


def caption_request(key: str) -> str:
    """One of CAPTION_REQUESTS, always the same for one id."""
    return CAPTION_REQUESTS[hashlib.sha256(key.encode()).digest()[0] % len(CAPTION_REQUESTS)]


class ImageFolder:
    """Where a file's images lie: beside it, in `images/`, or in `images/` beside its folder, as LLaVA-Med's `data/` has it."""

    def __init__(self, folder: Path) -> None:
        self._bases = [folder, folder / "images", folder.parent / "images"]

    def find(self, name: str) -> Path:
        """The image's path; where it is nowhere, the path in the folder that had the last one."""
        for base in self._bases:
            if (base / name).is_file():
                if base is not self._bases[0]:  # looked at first from now on
                    self._bases.remove(base)
                    self._bases.insert(0, base)
                return base / name
        return self._bases[0] / name
