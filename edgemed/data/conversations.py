"""LLaVA's JSON files, as LLaVA-Med publishes them, and figure captions.

llava     alignment (500k), instruction (10k, 60k, 60k inline-mention), Med-MoE's and one's own: a list of {id, image, conversations},
          JSON or JSONL; also with the key `conversatons`, and with the image's marker before or after the first question
captions  instruct_fig_captions.json: {domain: [{pair_id, fig_caption, …}]}, or such a list; the image is PAIR_ID.jpg

The marker's place does not matter: training and the runtime put the image where the template says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgemed.core.conversation import IMAGE_MARKER, Turn
from edgemed.core.errors import DatasetError
from edgemed.data.rows import ImageFolder, Row, answer_type, caption_request, each, field, find_file, plain, read_json, read_rows
from edgemed.data.samples import Sample

_ROLES = {"human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


def read_llava(path: Path, split: str, problems: list[DatasetError] | None = None) -> list[Sample]:
    """`path` is the file, or a folder with SPLIT.json or SPLIT.jsonl."""
    file = path if path.is_file() else find_file(path, split, (".json", ".jsonl"))
    images = ImageFolder(file.parent)

    def make(position: int, row: Row) -> Sample:
        rounds = row.get("conversations", row.get("conversatons"))
        if not isinstance(rounds, list) or len(rounds) < 2 or len(rounds) % 2:
            raise DatasetError(f"Expected pairs of 'human' and 'gpt' in row {position} of {file}, found {rounds!r:.80}.", "Check the row.")
        image = images.find(str(row["image"])) if row.get("image") else None
        turns = tuple(_turns(rounds, image, file, position))
        native = plain(row.get("answer_type", "")).strip()
        return Sample(str(row.get("id", row.get("pair_id", position))), image, turns, answer_type(native), native_type=native)

    samples: list[Sample] = each(read_rows(file), make, file, problems)
    return samples


def _turns(rounds: list[Any], image: Path | None, file: Path, position: int) -> list[Turn]:
    turns = []
    for k, message in enumerate(rounds):
        want = ("human", "gpt")[k % 2]
        said = message.get("from") if isinstance(message, dict) else message
        if not isinstance(message, dict) or _ROLES.get(str(said)) != want:
            raise DatasetError(f"Expected a message from '{want}' in row {position} of {file}, found '{said!s:.80}'.", "Check the row.")
        text = plain("" if message.get("value") is None else message["value"])
        images = text.count(IMAGE_MARKER)
        if k and images:
            raise DatasetError(f"Expected the image in the first message of row {position} of {file}, found it in message {k}.", "Move it.")
        if k == 0 and images != (1 if image else 0):
            raise DatasetError(
                f"Expected {1 if image else 0} {IMAGE_MARKER} in row {position} of {file}, found {images}.", "Check the row."
            )
        text = text.replace(IMAGE_MARKER, "").strip()
        if want == "gpt" and not text:
            raise DatasetError(f"Expected an answer in row {position} of {file}, found an empty one.", "Check the row.")
        turns.append(Turn("user" if k % 2 == 0 else "assistant", text, images))
    return turns


def read_captions(path: Path, split: str, problems: list[DatasetError] | None = None) -> list[Sample]:
    """`path` is the file, or a folder with instruct_fig_captions.json or SPLIT.json. A request for a description stands before each."""
    file = path if path.is_file() else path / "instruct_fig_captions.json"
    file = file if file.is_file() else find_file(path, split, (".json", ".jsonl"))
    found = read_json(file)
    groups = list(found.values()) if isinstance(found, dict) else [found]
    if not all(isinstance(group, list) and all(isinstance(row, dict) for row in group) for group in groups):
        raise DatasetError(f"Expected lists of captions by domain in {file}, found something else.", "Check the file's format.")
    images = ImageFolder(file.parent)

    def make(position: int, row: Row) -> Sample:
        name = field(row, "pair_id", file, position)
        caption = field(row, "fig_caption", file, position)
        if not caption:
            raise DatasetError(f"Expected a caption in row {position} of {file}, found an empty one.", "Remove the row.")
        image = images.find(plain(row["image"]) if row.get("image") else f"{name}.jpg")
        return Sample.single(name, image, caption_request(name), caption, "open")

    samples: list[Sample] = each([row for group in groups for row in group], make, file, problems)
    return samples
