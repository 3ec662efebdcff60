"""Data sets → samples, one reader a set, chosen by name from READERS.

slake     train.json / validate.json / test.json + imgs/; English rows
vqa-rad   `VQA_RAD Dataset Public.json` + `VQA_RAD Image Folder/`; test rows are those whose phrase_type starts with "test_"
pathvqa   train.jsonl … + images/
          these three also as hub exports: parquet files, or a folder of `Dataset.save_to_disk` (edgemed/data/export.py)
llava     LLaVA's conversations, LLaVA-Med's alignment and instruction files among them (edgemed/data/conversations.py)
captions  LLaVA-Med's figure captions
csv       one's own: a folder with SPLIT.csv, or the file; columns image, question, answer (or image, caption), and if you like id,
          answer_type and split; images beside it or in images/

A missing file, a row without its fields and a missing image raise DatasetError. Numbers and lists as answers become text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgemed.core.errors import DatasetError
from edgemed.core.files import found_at
from edgemed.data.conversations import read_captions, read_llava
from edgemed.data.export import is_export, read_export
from edgemed.data.rows import (
    ImageFolder,
    Row,
    answer_type,
    caption_request,
    each,
    field,
    find_file,
    literal_type,
    read_rows,
    read_table,
    split_names,
)
from edgemed.data.samples import Sample

Problems = list[DatasetError] | None
Reader = Callable[[Path, str, Problems], list[Sample]]


def load_samples(name: str, path: Path, split: str = "train", max_missing: float = 0.0) -> list[Sample]:
    """All samples of a set's split, in file order. Raises DatasetError.

    Rows whose image is missing are left out, as long as they are at most the share `max_missing` of all: figures vanish from PMC.
    """
    samples = read_set(name, path, split)
    missing = [s.image for s in samples if s.image and not s.image.is_file()]
    if len(missing) > max_missing * len(samples):
        raise DatasetError(
            f"Expected the image {missing[0]}, found none ({len(missing)} of {len(samples)} rows lack theirs).", "Copy the images."
        )
    return [s for s in samples if not s.image or s.image.is_file()] if missing else samples


def read_set(name: str, path: Path, split: str = "train", problems: Problems = None) -> list[Sample]:
    """`load_samples` without a look at the images. Rows that cannot be read go into `problems` where it is given."""
    if name not in READERS:
        raise DatasetError(f"Expected a data set out of {', '.join(READERS)}, found '{name}'.", "Write NAME=PATH with one of them.")
    if name in EXPORTED and not path.is_dir():
        found = found_at(path, "nothing")
        raise DatasetError(f"Expected the folder of the data set {name} at {path}, found {found}.", "Check the path.")
    if not path.exists():
        raise DatasetError(f"Expected the data set {name} at {path}, found {found_at(path, 'nothing')}.", "Check the path.")
    if name in EXPORTED and is_export(path):
        samples = read_export(name, path, split, problems)
    else:
        samples = READERS[name](path, split, problems)
    if not samples and not problems:
        raise DatasetError(f"Expected rows in the split '{split}' of {name} at {path}, found none.", "Check the split's name.")
    return samples


def _single(set_name: str, path: Path, position: int, row: Row, image: Path, id_key: str, **facts: str) -> Sample:
    """A row with the fields that SLAKE, VQA-RAD and PathVQA share; `facts` as in Sample.single."""
    return Sample.single(
        f"{set_name}-{field(row, id_key, path, position)}",
        image,
        field(row, "question", path, position),
        field(row, "answer", path, position),
        answer_type(field(row, "answer_type", path, position)),
        native_type=field(row, "answer_type", path, position),
        **facts,
    )


def _read_slake(folder: Path, split: str, problems: Problems) -> list[Sample]:
    path = find_file(folder, split, (".json",))

    def make(position: int, row: Row) -> Sample | None:
        if row.get("q_lang") != "en":
            return None
        image = folder / "imgs" / field(row, "img_name", path, position)
        facts = {"modality": str(row.get("modality", "")), "organ": str(row.get("location", ""))}
        return _single("slake", path, position, row, image, "qid", **facts)

    samples: list[Sample] = each(read_rows(path), make, path, problems)
    return samples


def _read_vqa_rad(folder: Path, split: str, problems: Problems) -> list[Sample]:
    path = folder / "VQA_RAD Dataset Public.json"
    chosen: dict[str, Callable[[bool], bool]] = {"train": lambda test: not test, "test": lambda test: test, "all": lambda test: True}
    if split not in chosen:
        raise DatasetError(f"Expected the split train, test or all of vqa-rad, found '{split}'.", "Choose one of them.")

    def make(position: int, row: Row) -> Sample | None:
        if not chosen[split](field(row, "phrase_type", path, position).startswith("test_")):
            return None
        image = folder / "VQA_RAD Image Folder" / field(row, "image_name", path, position)
        return _single("vqa-rad", path, position, row, image, "qid", organ=str(row.get("image_organ", "")))

    samples: list[Sample] = each(read_rows(path), make, path, problems)
    return samples


def _read_pathvqa(folder: Path, split: str, problems: Problems) -> list[Sample]:
    path = find_file(folder, split, (".jsonl",))

    def make(position: int, row: Row) -> Sample:
        return _single("pathvqa", path, position, row, folder / field(row, "image", path, position), "id")

    samples: list[Sample] = each(read_rows(path), make, path, problems)
    return samples


def _read_csv(path: Path, split: str, problems: Problems) -> list[Sample]:
    file = path if path.is_file() else find_file(path, split, (".csv", ".tsv"))
    images, rows = ImageFolder(file.parent), read_table(file)
    asked = bool(rows) and "question" in rows[0]
    if rows and not ({"image", "question", "answer"} <= rows[0].keys() or {"image", "caption"} <= rows[0].keys()):
        raise DatasetError(
            f"Expected the columns image, question and answer, or image and caption, in {file}, found {', '.join(rows[0])}.",
            "Name them in the first line.",
        )

    def make(position: int, row: Row) -> Sample | None:
        if row.get("split") and row["split"].strip() not in split_names(split):
            return None
        number = position + 2  # the line, as a spreadsheet counts; the header is line 1
        name = row.get("id") or str(number)
        question = field(row, "question", file, number) if asked else caption_request(name)
        answer = field(row, "answer" if asked else "caption", file, number)
        image = images.find(row["image"].strip()) if row.get("image", "").strip() else None
        if not (question and answer):
            raise DatasetError(f"Expected a question and an answer in line {number} of {file}, found an empty one.", "Fill it in.")
        kind = answer_type(row.get("answer_type") or "") if row.get("answer_type") else literal_type(answer)
        return Sample.single(name, image, question, answer, kind)

    samples: list[Sample] = each(rows, make, file, problems)
    return samples


READERS: dict[str, Reader] = {
    "slake": _read_slake,
    "vqa-rad": _read_vqa_rad,
    "pathvqa": _read_pathvqa,
    "llava": read_llava,
    "captions": read_captions,
    "csv": _read_csv,
}
EXPORTED = ("slake", "vqa-rad", "pathvqa")
