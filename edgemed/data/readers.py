"""Native layouts → samples, one reader a set, chosen by name from READERS.

slake     train.json / validate.json / test.json + imgs/; English rows
vqa-rad   `VQA_RAD Dataset Public.json` + `VQA_RAD Image Folder/`; test rows are those whose phrase_type starts with "test_"
pathvqa   train.jsonl … + images/
llava     a JSON list of conversations (also with the misspelt key `conversatons`) beside its images

A missing file, a row without its fields and a missing image raise DatasetError.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgemed.core.conversation import IMAGE_MARKER, Turn
from edgemed.core.errors import DatasetError
from edgemed.core.files import os_errors
from edgemed.data.samples import AnswerType, Sample

Row = dict[str, Any]
# SLAKE and VQA-RAD write OPEN/CLOSED (VQA-RAD also with a trailing blank), Med-MoE's files open/close.
_TYPES: dict[str, AnswerType] = {
    "open": "open",
    "closed": "closed",
    "close": "closed",
    "yes/no": "closed",
    "other": "open",
    "number": "open",
}


def load_samples(name: str, path: Path, split: str = "train") -> list[Sample]:
    """All samples of a set's split, in file order. Raises DatasetError."""
    if name not in READERS:
        raise DatasetError(f"Expected a data set out of {', '.join(READERS)}, found '{name}'.", "Write NAME=PATH with one of them.")
    if not path.exists():
        raise DatasetError(f"Expected the data set {name} at {path}, found nothing.", "Check the path.")
    samples = READERS[name](path, split)
    if not samples:
        raise DatasetError(f"Expected rows in the split '{split}' of {name} at {path}, found none.", "Check the split's name.")
    missing = [s.image for s in samples if s.image and not s.image.is_file()]
    if missing:
        raise DatasetError(
            f"Expected the image {missing[0]}, found none ({len(missing)} of {len(samples)} rows lack theirs).", "Copy the images."
        )
    return samples


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise DatasetError(f"Expected the file {path}, found none.", "Check the data set's folder.")
    with os_errors(path):
        text = path.read_text(encoding="utf-8")
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else json.loads(text)
    except ValueError as error:
        raise DatasetError(f"Expected JSON in {path}, found something else ({error}).", "Download or copy the file again.") from error


def _rows(path: Path) -> list[Row]:
    rows = _read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DatasetError(f"Expected a list of objects in {path}, found {type(rows).__name__}.", "Check the file's format.")
    return rows


def _field(row: Row, key: str, path: Path, position: int) -> str:
    if key not in row:
        raise DatasetError(f"Expected the field '{key}' in row {position} of {path}, found {', '.join(row)}.", "Check the file's format.")
    value = row[key]
    # An answer may be a number, or a list of them.
    return (", ".join(map(str, value)) if isinstance(value, list) else str(value)).strip()


def _answer_type(value: str) -> AnswerType:
    return _TYPES.get(value.strip().lower(), "unknown")


def _read_slake(folder: Path, split: str) -> list[Sample]:
    path = folder / f"{split}.json"
    return [
        Sample.single(
            f"slake-{_field(row, 'qid', path, i)}",
            folder / "imgs" / _field(row, "img_name", path, i),
            _field(row, "question", path, i),
            _field(row, "answer", path, i),
            _answer_type(_field(row, "answer_type", path, i)),
            modality=str(row.get("modality", "")),
            organ=str(row.get("location", "")),
            native_type=str(row["answer_type"]).strip(),
        )
        for i, row in enumerate(_rows(path))
        if row.get("q_lang") == "en"
    ]


def _read_vqa_rad(folder: Path, split: str) -> list[Sample]:
    path = folder / "VQA_RAD Dataset Public.json"
    chosen: dict[str, Callable[[bool], bool]] = {"train": lambda test: not test, "test": lambda test: test, "all": lambda test: True}
    if split not in chosen:
        raise DatasetError(f"Expected the split train, test or all of vqa-rad, found '{split}'.", "Choose one of them.")
    return [
        Sample.single(
            f"vqa-rad-{_field(row, 'qid', path, i)}",
            folder / "VQA_RAD Image Folder" / _field(row, "image_name", path, i),
            _field(row, "question", path, i),
            _field(row, "answer", path, i),
            _answer_type(_field(row, "answer_type", path, i)),
            organ=str(row.get("image_organ", "")),
            native_type=str(row["answer_type"]).strip(),
        )
        for i, row in enumerate(_rows(path))
        if chosen[split](_field(row, "phrase_type", path, i).startswith("test_"))
    ]


def _read_pathvqa(folder: Path, split: str) -> list[Sample]:
    path = folder / f"{split}.jsonl"
    return [
        Sample.single(
            f"pathvqa-{_field(row, 'id', path, i)}",
            folder / _field(row, "image", path, i),
            _field(row, "question", path, i),
            _field(row, "answer", path, i),
            _answer_type(_field(row, "answer_type", path, i)),
            native_type=str(row["answer_type"]).strip(),
        )
        for i, row in enumerate(_rows(path))
    ]


def _read_llava(path: Path, split: str) -> list[Sample]:
    """`path` is the JSON file, or a folder with `SPLIT.json`; images lie beside it or in `images/`."""
    file = path if path.is_file() else path / f"{split}.json"
    samples = []
    for i, row in enumerate(_rows(file)):
        rounds = row.get("conversations", row.get("conversatons"))
        if not isinstance(rounds, list) or len(rounds) < 2 or len(rounds) % 2:
            raise DatasetError(f"Expected pairs of 'human' and 'gpt' in row {i} of {file}, found {rounds!r:.80}.", "Check the row.")
        image = _find_image(file.parent, str(row["image"])) if row.get("image") else None
        kind = str(row.get("answer_type", "")).strip()
        turns = tuple(_turns(rounds, image, file, i))
        samples.append(Sample(str(row.get("id", i)), image, turns, _answer_type(kind), native_type=kind))
    return samples


def _find_image(folder: Path, name: str) -> Path:
    return folder / name if (folder / name).is_file() or not (folder / "images" / name).is_file() else folder / "images" / name


def _turns(rounds: list[Any], image: Path | None, file: Path, position: int) -> list[Turn]:
    turns = []
    for k, message in enumerate(rounds):
        want = ("human", "gpt")[k % 2]
        said = message.get("from") if isinstance(message, dict) else message
        if said != want or not isinstance(message, dict):
            raise DatasetError(f"Expected a message from '{want}' in row {position} of {file}, found '{said!s:.80}'.", "Check the row.")
        text = str(message.get("value", ""))
        images = text.count(IMAGE_MARKER)
        if k and images:
            raise DatasetError(f"Expected the image in the first message of row {position} of {file}, found it in message {k}.", "Move it.")
        if k == 0 and images != (1 if image else 0):
            raise DatasetError(
                f"Expected {1 if image else 0} {IMAGE_MARKER} in row {position} of {file}, found {images}.", "Check the row."
            )
        turns.append(Turn("user" if k % 2 == 0 else "assistant", text.replace(IMAGE_MARKER, "").strip(), images))
    return turns


READERS: dict[str, Callable[[Path, str], list[Sample]]] = {
    "slake": _read_slake,
    "vqa-rad": _read_vqa_rad,
    "pathvqa": _read_pathvqa,
    "llava": _read_llava,
}
