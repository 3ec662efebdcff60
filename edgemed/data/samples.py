"""One question about one image, from whatever set it came."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgemed.core.conversation import Turn

AnswerType = Literal["closed", "open", "unknown"]


@dataclass(frozen=True)
class Sample:
    """A conversation with at most one image. Question and answer are those of the last round.

    `modality` and `organ` are the set's own words, empty where it has none; so is `native_type`, from which `answer_type` was read.
    """

    id: str
    image: Path | None
    turns: tuple[Turn, ...]
    answer_type: AnswerType = "unknown"
    modality: str = ""
    organ: str = ""
    native_type: str = ""

    @property
    def question(self) -> str:
        return self.turns[-2].text

    @property
    def answer(self) -> str:
        return self.turns[-1].text

    @classmethod
    def single(cls, id: str, image: Path | None, question: str, answer: str, answer_type: AnswerType, **facts: str) -> Sample:
        """A sample of one round; `facts` are modality, organ and native_type."""
        return cls(id, image, (Turn("user", question, images=1 if image else 0), Turn("assistant", answer)), answer_type, **facts)


def hash_samples(samples: Iterable[Sample]) -> str:
    """Hex SHA-256 over ids, image names and texts, in order: names a split in results and run.json."""
    digest = hashlib.sha256()
    for s in samples:
        row = [s.id, s.image.name if s.image else "", [[t.role, t.text] for t in s.turns]]
        digest.update(json.dumps(row, ensure_ascii=False).encode())
    return digest.hexdigest()
