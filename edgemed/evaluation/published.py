"""What others have published about their models, as data with its source (published.toml).

    published = load_published()                             # or of a file of the user's with more rows
    published.points("slake", "closed")                      # those with accuracy and memory
    published.memory_only("slake", "closed")                 # those whose accuracy is not at hand

Accuracies there are by the old metrics and on test splits, ours by whatever was chosen: they stand beside, and are not ranked with ours.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError, model_validator

from edgemed.core.errors import InputError
from edgemed.core.files import os_errors
from edgemed.core.model import Frozen

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PATH = Path(__file__).with_name("published.toml")


class Source(Frozen):
    """A publication, and how its figures came here."""

    title: str
    where: str
    basis: str
    gb_bytes: int = Field(gt=0)


class Memory(Frozen):
    """Memory of one model in the source's GB."""

    model: str
    bits: int
    static_gb: float | None = None
    dynamic_gb: float = Field(gt=0)
    source: str
    place: str
    verified: bool


class Accuracy(Frozen):
    """A score of one model on one set's test split, in percent."""

    model: str
    dataset: str
    metric: Literal["closed", "open"]
    percent: float = Field(ge=0, le=100)
    source: str
    place: str
    verified: bool


class Claim(Frozen):
    """A figure that belongs to no single model, in words."""

    text: str
    source: str
    place: str


class Missing(Frozen):
    """Figures that are known to exist and are not at hand."""

    source: str
    what: str


@dataclass(frozen=True)
class PublishedPoint:
    """A model's dynamic memory and, where it is known, its accuracy."""

    model: str
    dynamic_bytes: int
    percent: float | None
    verified: bool
    sources: tuple[str, ...]


class Published(Frozen):
    """published.toml."""

    schema_version: Literal[1]
    source: dict[str, Source]
    memory: tuple[Memory, ...] = ()
    accuracy: tuple[Accuracy, ...] = ()
    claim: tuple[Claim, ...] = ()
    missing: tuple[Missing, ...] = ()

    @model_validator(mode="after")
    def _check_sources(self) -> Published:
        rows: tuple[Memory | Accuracy | Claim | Missing, ...] = (*self.memory, *self.accuracy, *self.claim, *self.missing)
        unknown = {row.source for row in rows} - set(self.source)
        if unknown:
            raise ValueError(f"expected [source] entries for {', '.join(sorted(unknown))}, found none")
        return self

    def points(self, dataset: str, metric: str) -> list[PublishedPoint]:
        """Models with both figures. Memory and accuracy may come from two publications, which are both named."""
        scores = {a.model: a for a in self.accuracy if (a.dataset, a.metric) == (dataset, metric)}
        return [self._point(m, scores[m.model]) for m in self.memory if m.model in scores]

    def memory_only(self, dataset: str, metric: str) -> list[PublishedPoint]:
        """Models whose accuracy on this set is not at hand."""
        known = {a.model for a in self.accuracy if (a.dataset, a.metric) == (dataset, metric)}
        return [self._point(m, None) for m in self.memory if m.model not in known]

    def _point(self, memory: Memory, score: Accuracy | None) -> PublishedPoint:
        names = dict.fromkeys([memory.source, *([score.source] if score else [])])
        return PublishedPoint(
            model=memory.model,
            dynamic_bytes=round(memory.dynamic_gb * self.source[memory.source].gb_bytes),
            percent=score.percent if score else None,
            verified=memory.verified and (score is None or score.verified),
            sources=tuple(names),
        )


def load_published(path: Path = PATH) -> Published:
    """Read and check. Raises InputError that names the first fault."""
    hint = f"Correct {path}; edgemed/evaluation/published.toml shows the form."
    with os_errors(path):
        data = path.read_bytes()
    try:
        return Published.model_validate(tomllib.loads(data.decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"Expected TOML in {path.name}, found a fault: {error}.", hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise InputError(f"Expected published figures in {path.name}, found at '{where}': {first['msg']}.", hint) from error
