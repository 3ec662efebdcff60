"""Which part of a set is meant: its own split, or a share of its images, so that no image is on both sides.

    name = parse_dataset("vqa-rad:all@1/5=../vqa-rad", split="validate")      # DatasetName("vqa-rad", Path, "all", (1, 5))
    samples = load_named(name)

`@1/5` is the first of five parts of the images, told apart by a hash of the image's name (with its folder's in sets such as SLAKE,
BY_FOLDER): VQA-RAD's official split shares nearly all of its test images with training, so that it must be split anew. Knows no pixels:
one image under two names can be on both sides.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgemed.core.errors import InputError
from edgemed.data.readers import load_samples
from edgemed.data.samples import Sample

_NAMED = re.compile(r"(?P<name>[^:=@]+)(:(?P<split>[^=@]+))?(@(?P<part>\d+/\d+))?=(?P<path>.+)", re.DOTALL)
# Sets that call every image the same, in a folder of its own.
BY_FOLDER = frozenset({"slake"})


@dataclass(frozen=True)
class DatasetName:
    """A set on disk, its split, and of its images the k-th of n parts (None: all)."""

    name: str
    path: Path
    split: str
    part: tuple[int, int] | None = None

    @property
    def label(self) -> str:
        """The split as a person reads it."""
        return self.split if self.part is None else f"{self.split}@{self.part[0]}/{self.part[1]}"


def parse_dataset(text: str, split: str) -> DatasetName:
    """NAME[:SPLIT][@K/N]=PATH; `split` where none is named. Raises InputError."""
    found = _NAMED.fullmatch(text)
    if found is None:
        raise InputError(f"Expected --dataset NAME=PATH, found '{text}'.", "For example: slake=../slake, or vqa-rad:all@1/5=../vqa-rad")
    part = parse_part(found["part"]) if found["part"] else None
    return DatasetName(found["name"], Path(found["path"]), found["split"] or split, part)


def parse_part(text: str) -> tuple[int, int]:
    """'1/5' → (1, 5), the first of five parts. Raises InputError."""
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise InputError(f"Expected a share such as 1/5, found '{text}'.", "Write 1/5 for the first fifth of the images.")
    return int(part), int(parts)


def load_named(dataset: DatasetName) -> list[Sample]:
    """The samples that are meant, in file order. Raises DatasetError."""
    samples = load_samples(dataset.name, dataset.path, dataset.split)
    return samples if dataset.part is None else take_part(samples, *dataset.part, dataset.name in BY_FOLDER)


def take_part(samples: Sequence[Sample], part: int, parts: int, by_folder: bool = False) -> list[Sample]:
    """The samples whose images are in the `part`-th (from 1) of `parts`; `by_folder`: a set's of BY_FOLDER."""
    return [s for s in samples if _number(s, by_folder) % parts == part - 1]


def leave_out(samples: Sequence[Sample], parts: Sequence[str], by_folder: bool = False) -> list[Sample]:
    """The samples whose images are in none of the parts ('1/5'). Raises InputError."""
    held = [parse_part(part) for part in parts]
    return [s for s in samples if all(_number(s, by_folder) % of != part - 1 for part, of in held)]


def _number(sample: Sample, by_folder: bool) -> int:
    image = sample.image
    name = sample.id if image is None else f"{image.parent.name}/{image.name}" if by_folder else image.name
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
