"""Ask a target every question of a set, a group an image; what is answered survives a SIGKILL.

    with EngineTarget(artifact) as target:
        answers = run(target, samples, folder=Path("out/slake"))      # folder None: nothing is kept

The folder holds `run.json` (what was asked of whom), `journal.jsonl` (answers as they come, a group at a time, synced) and, at the end,
`predictions.jsonl` in the set's order with `predictions-timed.jsonl` beside it. Begun again, groups that are whole in the journal are not
asked again; one that was cut is asked again whole, because an answer's last bits depend on what is answered beside it. So an
interrupted run ends with the file that an uninterrupted one writes, byte for byte.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgemed.core.errors import DatasetError, InputError, ResourceError
from edgemed.core.filelock import FileLock
from edgemed.core.files import os_errors, save_text
from edgemed.data.samples import Sample, hash_images, hash_samples
from edgemed.evaluation.looks import View, swap_images
from edgemed.evaluation.predictions import Prediction, make_answer_id, name_some, save_predictions
from edgemed.evaluation.targets import Reply, Target

RUN_NAME, JOURNAL_NAME = "run.json", "journal.jsonl"
PREDICTIONS_NAME, TIMED_NAME = "predictions.jsonl", "predictions-timed.jsonl"
SCHEMA_VERSION = 1
# Questions without an image, and more about one than anybody means, are asked in groups of this size.
_MOST_IN_GROUP = 256


@dataclass(frozen=True)
class Group:
    """Questions about one image: their places in the set, and the image shown instead where images are swapped."""

    places: tuple[int, ...]
    donor: Path | None = None


def group_samples(samples: Sequence[Sample]) -> list[Group]:
    """Places by image, in order of their first question."""
    by_image: dict[Path | None, list[int]] = {}
    for place, sample in enumerate(samples):
        by_image.setdefault(sample.image, []).append(place)
    donors = swap_images([path for path in by_image if path is not None])
    return [
        Group(tuple(places[start : start + _MOST_IN_GROUP]), donors[path] if path else None)
        for path, places in by_image.items()
        for start in range(0, len(places), _MOST_IN_GROUP)
    ]


def check_ids(samples: Sequence[Sample]) -> None:
    """Raises DatasetError where an id comes twice: answers would be paired with the wrong question."""
    twice = [id for id, count in Counter(s.id for s in samples).items() if count > 1]
    if twice:
        raise DatasetError(f"Expected each id once, found {name_some(twice)} more than once.", "Give the rows ids of their own.")


def run(
    target: Target,
    samples: Sequence[Sample],
    view: View = "shown",
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Reply]:
    """Replies in the samples' order. Raises DatasetError, InputError (a folder of another run), ResourceError (one that another program
    writes into), ImageError and what the target raises."""
    check_ids(samples)
    with nullcontext() if folder is None else _alone(folder):
        return _run(target, samples, view, folder, progress)


def _alone(folder: Path) -> FileLock:
    with os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    said = f"Expected {folder} for this evaluation alone, found another program that writes into it."
    return FileLock(folder / ".lock", ResourceError(said, "Wait for it, or choose another folder with --out."))


def _run(
    target: Target, samples: Sequence[Sample], view: View, folder: Path | None, progress: Callable[[int, int], None] | None
) -> list[Reply]:
    groups = group_samples(samples)
    journal = Journal(folder, _describe(target, samples, view)) if folder else None
    replies = journal.restore(samples, groups) if journal else {}
    left = [group for group in groups if group.places[0] not in replies]
    for group, answers in _ask_all(target, samples, left, view):
        found = dict(zip(group.places, answers, strict=True))
        if journal:
            journal.append([(samples[place].id, reply) for place, reply in found.items()])
        replies |= found
        if progress:
            progress(len(replies), len(samples))
    ordered = [replies[place] for place in range(len(samples))]
    if folder:
        save_answers(folder, target, samples, ordered)
    return ordered


def _ask_all(target: Target, samples: Sequence[Sample], groups: Sequence[Group], view: View) -> Iterator[tuple[Group, list[Reply]]]:
    """Groups as they are answered, as many at once as the target takes; large ones first, so that none keeps others waiting at the end."""
    ordered = sorted(groups, key=lambda group: len(group.places), reverse=True)
    with ThreadPoolExecutor(target.parallel) as pool:
        asked = {pool.submit(target.answer, [samples[place] for place in g.places], view, g.donor): g for g in ordered}
        try:
            for future in as_completed(asked):
                yield asked[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def save_answers(folder: Path, target: Target, samples: Sequence[Sample], replies: Sequence[Reply]) -> None:
    """Both prediction files."""
    rows = [_predict(target, sample, reply) for sample, reply in zip(samples, replies, strict=True)]
    timed = [{"inference_time": r.elapsed_s, "memory_usage": r.memory_bytes and r.memory_bytes / 1e9} for r in replies]
    save_predictions(folder / TIMED_NAME, rows, timed)
    save_predictions(folder / PREDICTIONS_NAME, rows)


def _predict(target: Target, sample: Sample, reply: Reply) -> Prediction:
    metadata: dict[str, Any] = {"tokens_generated": reply.tokens}
    metadata |= {"score": reply.score} if reply.score is not None else {}
    metadata |= {"error": reply.error} if reply.error else {}
    return Prediction(
        sample.id, sample.question, reply.text, make_answer_id(target.identity, sample.id, reply.text), target.name, metadata
    )


def _describe(target: Target, samples: Sequence[Sample], view: View) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "model_id": target.name,
        "target": target.identity,
        "samples_sha256": hash_samples(samples),
        "images_sha256": hash_images(samples),
        "questions": len(samples),
        "view": view,
    }


class Journal:
    """Answers on disk as they come. Raises InputError where the folder is another run's."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        self._path = folder / JOURNAL_NAME
        known = folder / RUN_NAME
        with os_errors(folder):
            found = _read_json(known) if known.is_file() else None
        if found is not None and found != about:
            different = [key for key in about if not isinstance(found, dict) or found.get(key) != about[key]]
            raise InputError(
                f"Expected a run of the same model, questions and settings in {folder}, found another ({', '.join(different)}).",
                "Choose another folder with --out.",
            )
        if found is None:
            save_text(known, json.dumps(about, indent=1) + "\n")

    def restore(self, samples: Sequence[Sample], groups: Sequence[Group]) -> dict[int, Reply]:
        """Replies by place, of groups that are whole; what is left of a cut one is dropped from the file."""
        kept: dict[str, Reply] = {}
        if self._path.is_file():
            with os_errors(self._path):
                lines = self._path.read_bytes().splitlines()
            for line in lines:
                row = _parse(line)
                if row is not None:
                    kept[row[0]] = row[1]
        out: dict[int, Reply] = {}
        for group in groups:
            if all(samples[place].id in kept for place in group.places):
                out |= {place: kept[samples[place].id] for place in group.places}
        save_text(self._path, "".join(_line(samples[place].id, reply) for place, reply in out.items()))
        return out

    def append(self, rows: Sequence[tuple[str, Reply]]) -> None:
        """Add a group, on disk before this returns."""
        with os_errors(self._path), self._path.open("ab") as file:
            file.write("".join(_line(id, reply) for id, reply in rows).encode())
            file.flush()
            os.fsync(file.fileno())


def _line(id: str, reply: Reply) -> str:
    return json.dumps({"id": id, **asdict(reply)}, ensure_ascii=False) + "\n"


def _parse(line: bytes) -> tuple[str, Reply] | None:
    """A journal's line, or None where a kill cut it."""
    try:
        row = json.loads(line)
        return row.pop("id"), Reply(**row)
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
        return None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
