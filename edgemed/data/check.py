"""What is wrong with data sets, before a GPU is paid for: rows, images, answers, leakage.

    report = check_splits([SplitSource("slake", Path("slake"), "train"), SplitSource("slake", Path("slake"), "validate")])
    report.problems         # sentences; empty: nothing that would stop a training run

Every row is read and every image decoded. How long the labels are in tokens, and whether a template fits a tokenizer, is
edgemed/finetune/labels.py's to say: no tokenizer is known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgemed.core.errors import DatasetError, ImageError
from edgemed.data.pixels import Leak, find_leaks, hash_images
from edgemed.data.readers import read_set
from edgemed.data.samples import Sample, hash_samples

Progress = Callable[[str, int, int], None]
# How many of a kind are named; the rest is counted.
NAMED = 5


@dataclass(frozen=True)
class SplitSource:
    """One split of one set."""

    name: str
    path: Path
    split: str

    @property
    def title(self) -> str:
        """How the split is called in a report."""
        return f"{self.name} {self.split}"


@dataclass(frozen=True)
class SplitReport:
    """What was found in one split."""

    source: SplitSource
    samples: tuple[Sample, ...]
    bad_rows: tuple[str, ...]
    missing: tuple[Path, ...]
    broken: dict[Path, str]
    hashes: dict[Path, str]
    duplicate_ids: tuple[str, ...]

    @property
    def images(self) -> int:
        """Different image files that rows name."""
        return len(self.missing) + len(self.broken) + len(self.hashes)

    @property
    def same_pixels(self) -> int:
        """Image files whose pixels another file of the split has, too."""
        return len(self.hashes) - len(set(self.hashes.values()))

    @property
    def answer_types(self) -> Counter[str]:
        """Rows by answer type."""
        return Counter(sample.answer_type for sample in self.samples)

    @property
    def problems(self) -> list[str]:
        """A sentence for each kind of problem, with the first few of it named."""
        title = self.source.title
        kinds: list[tuple[str, Sequence[object]]] = [
            ("rows that cannot be read", self.bad_rows),
            ("images that are missing", self.missing),
            ("images that are broken", [f"{path.name}: {why}" for path, why in self.broken.items()]),
            ("ids that several rows have", self.duplicate_ids),
        ]
        out = [f"{title}: {len(found)} {what}: {_some(found)}" for what, found in kinds if found]
        if not self.samples:
            out.append(f"{title}: no rows")
        return out

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return {
            "name": self.source.name,
            "split": self.source.split,
            "path": self.source.path,
            "rows": len(self.samples),
            "sha256": hash_samples(self.samples),
            "images": self.images,
            "same_pixels": self.same_pixels,
            "answer_types": dict(self.answer_types),
            "bad_rows": list(self.bad_rows),
            "missing": list(self.missing),
            "broken": {str(path): why for path, why in self.broken.items()},
            "duplicate_ids": list(self.duplicate_ids),
        }


@dataclass(frozen=True)
class CheckReport:
    """All splits, and what they share."""

    splits: tuple[SplitReport, ...]
    leaks: tuple[Leak, ...]

    @classmethod
    def of(cls, splits: Sequence[SplitReport]) -> CheckReport:
        """With the images that any two of the splits share."""
        return cls(tuple(splits), tuple(find_leaks({split.source.title: split.hashes for split in splits})))

    @property
    def problems(self) -> list[str]:
        """Everything that should be looked at before training."""
        out = [problem for split in self.splits for problem in split.problems]
        for leak in self.leaks:
            named = _some([f"{a.name} = {b.name}" if a.name != b.name else a.name for a, b in leak.pairs])
            out.append(f"{leak.first} and {leak.second} share {len(leak.pairs)} images: {named}")
        return out


def _some(found: Sequence[object]) -> str:
    named = "; ".join(str(what) for what in found[:NAMED])
    return named if len(found) <= NAMED else f"{named}; and {len(found) - NAMED} more"


def check_splits(sources: Sequence[SplitSource], progress: Progress | None = None) -> CheckReport:
    """Read all rows, decode all images. Raises DatasetError only where a set or split is not there at all."""
    return CheckReport.of([check_split(source, progress) for source in sources])


def check_split(source: SplitSource, progress: Progress | None = None) -> SplitReport:
    """One split's rows and images. Raises DatasetError where it is not there at all."""
    problems: list[DatasetError] = []
    samples = read_set(source.name, source.path, source.split, problems)
    paths = list(dict.fromkeys(s.image for s in samples if s.image))
    missing: list[Path] = []
    broken: dict[Path, str] = {}
    hashes: dict[Path, str] = {}
    for done, (path, found) in enumerate(hash_images(paths), start=1):
        if found is None:
            missing.append(path)
        elif isinstance(found, ImageError):
            broken[path] = found.message
        else:
            hashes[path] = found
        if progress:
            progress(f"Decoding {source.title}", done, len(paths))
    ids = Counter(sample.id for sample in samples)
    twice = tuple(name for name, count in ids.items() if count > 1)
    return SplitReport(source, tuple(samples), tuple(e.message for e in problems), tuple(missing), broken, hashes, twice)
