"""A converted model's answers to conversation questions, for a judge: greedy, in the seed's prediction format.

    answer_questions(engine, Path("llava_med_eval_qa50_qa.jsonl"), Path("images"), Path("out/answers.jsonl"))

Lines are flushed as they come; a run that was killed goes on behind the last whole line. The image's marker is taken out of a question:
where the image stands is the model's own template's matter.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgemed.core.conversation import IMAGE_MARKER, Turn
from edgemed.core.errors import DatasetError, InputError
from edgemed.core.files import found_at, os_errors, sha256_file
from edgemed.core.manifest import MANIFEST_NAME
from edgemed.evaluation.judge.questions import read_rows
from edgemed.evaluation.predictions import Prediction, load_predictions, make_answer_id
from runtimes.engine import Engine

# LLaVA-Med's own limit for such answers.
MAX_TOKENS = 1024


def answer_questions(
    engine: Engine,
    questions: Path,
    images: Path,
    path: Path,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Answer what `path` holds no answer to yet. Raises DatasetError (an image is missing), InputError (answers of another model)."""
    if not images.is_dir():
        raise DatasetError(f"Expected a folder of images at {images}, found {found_at(images)}.", "Check --image-folder.")
    rows = list(read_rows(questions, ("question_id", "text", "image")).items())[:limit]
    missing = [str(row["image"]) for _, row in rows if not (images / str(row["image"])).is_file()]
    if missing:
        raise DatasetError(
            f"Expected the image {images / missing[0]}, found none ({len(missing)} of {len(rows)} questions lack theirs).",
            "Copy the images.",
        )
    model = engine.artifact.folder.name
    identity = sha256_file(engine.artifact.folder / MANIFEST_NAME)
    with os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        done = _kept(path, identity)
        with path.open("ab") as f:
            for number, (key, row) in enumerate(rows, 1):
                if key not in done:
                    f.write(_answer(engine, key, row, images, model, identity).line().encode() + b"\n")
                    f.flush()
                    os.fsync(f.fileno())
                if progress:
                    progress(number, len(rows))


def _kept(path: Path, identity: str) -> set[str]:
    """Ids of whole lines; half a line at the end is cut off."""
    if not path.is_file():
        return set()
    size = path.read_bytes().rfind(b"\n") + 1
    os.truncate(path, size)
    rows = load_predictions(path)
    if any(row.metadata.get("manifest_sha256") != identity for row in rows):
        raise InputError(f"Expected answers of this model in {path}, found those of another.", "Choose another folder with --out.")
    return {row.question_id for row in rows}


def _answer(engine: Engine, key: str, row: Mapping[str, Any], images: Path, model: str, identity: str) -> Prediction:
    text = str(row["text"]).replace(IMAGE_MARKER, "").strip()
    room = engine.settings.context_tokens - engine.artifact.manifest.vision.image_tokens
    finished = engine.ask((Turn("user", text, images=1),), [images / str(row["image"])], max_tokens=max(1, min(MAX_TOKENS, room // 2)))
    facts = {"tokens_generated": finished.usage.new_tokens, "reason": finished.reason, "manifest_sha256": identity}
    return Prediction(key, text, finished.text, make_answer_id(identity, key), model, facts)
