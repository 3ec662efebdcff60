"""One question about one image, from whatever set it came."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from edgemed.core.conversation import Turn
from edgemed.core.files import os_errors

AnswerType = Literal["closed", "open", "unknown"]
# What `hash_images` reads of each.
HEAD_BYTES = 4096


@dataclass(frozen=True)
class Sample:
    """A conversation with at most one image. Question and answer are those of the last round.

    `modality` and `organ` are the set's own words, empty where it has none; so is `native_type`, from which `answer_type` was read.
    `mirrored`: the image is meant left to right (`mirror`).
    """

    id: str
    image: Path | None
    turns: tuple[Turn, ...]
    answer_type: AnswerType = "unknown"
    modality: str = ""
    organ: str = ""
    native_type: str = ""
    mirrored: bool = False

    @property
    def question(self) -> str:
        return self.turns[-2].text

    @property
    def answer(self) -> str:
        return self.turns[-1].text

    @classmethod
    def single(
        cls,
        id: str,
        image: Path | None,
        question: str,
        answer: str,
        answer_type: AnswerType,
        modality: str = "",
        organ: str = "",
        native_type: str = "",
    ) -> Sample:
        """A sample of one round."""
        turns = Turn("user", question, images=1 if image else 0), Turn("assistant", answer)
        return cls(id, image, turns, answer_type, modality, organ, native_type)


_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_OTHER = {"left": "right", "right": "left"}


def swap_sides(text: str) -> str:
    """Left for right and right for left, in the case that each is written in."""

    def other(found: re.Match[str]) -> str:
        word = found[0]
        swapped = _OTHER[word.lower()]
        return swapped.upper() if word.isupper() else swapped.capitalize() if word[0].isupper() else swapped

    return _SIDES.sub(other, text)


def mirror(sample: Sample) -> Sample:
    """The sample about its image seen in a mirror."""
    turns = tuple(replace(turn, text=swap_sides(turn.text)) for turn in sample.turns)
    return replace(sample, id=f"{sample.id}-mirrored", turns=turns, mirrored=not sample.mirrored)


def merge_answers(samples: Iterable[Sample]) -> list[Sample]:
    """Questions that are asked of one image several times become one, answered by all their answers in turn; not those of yes and no.

    PathVQA asks "What is present?" of one image up to six times, with up to three answers. Apart they are labels that contradict each
    other; no greedy answer can learn them.
    """
    groups: dict[object, list[Sample]] = {}
    for sample in samples:
        closed = sample.answer_type == "closed" or sample.answer.casefold().strip(" .") in ("yes", "no")
        apart = sample.image is None or len(sample.turns) != 2 or closed
        key = len(groups) if apart else (sample.image, sample.mirrored, sample.question.casefold().strip())
        groups.setdefault(key, []).append(sample)
    return [_with_answers(group) for group in groups.values()]


def _with_answers(group: list[Sample]) -> Sample:
    first = group[0]
    texts: dict[str, str] = {}
    for sample in group:
        texts.setdefault(sample.answer.casefold().strip(), sample.answer.strip())
    if len(texts) == 1:
        return first
    return replace(first, turns=(first.turns[0], replace(first.turns[1], text=", ".join(texts.values()))))


def hash_samples(samples: Iterable[Sample]) -> str:
    """Hex SHA-256 over ids, image names and texts, in order: names a split in results and run.json."""
    digest = hashlib.sha256()
    for s in samples:
        row = [s.id, s.image.name if s.image else "", [[t.role, t.text] for t in s.turns]]
        digest.update(json.dumps(row, ensure_ascii=False).encode())
    return digest.hexdigest()


def hash_images(samples: Iterable[Sample]) -> str:
    """Hex SHA-256 over the size and the first bytes of every image: other images are seen without reading hundreds of gigabytes."""

    def head(path: Path) -> bytes:
        with os_errors(path), path.open("rb") as file:
            return file.read(HEAD_BYTES) + os.fstat(file.fileno()).st_size.to_bytes(8, "little")

    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for piece in pool.map(head, dict.fromkeys(s.image for s in samples if s.image)):
            digest.update(piece)
    return digest.hexdigest()
