"""Hub exports of SLAKE, VQA-RAD and PathVQA, and any set with the columns image, question and answer (`datasets` extra).

    is_export(folder)                           # parquet files, or what `Dataset.save_to_disk` wrote
    read_export("vqa-rad", folder, "train")     # samples; images that are stored inside are written to edgemed's cache
    pull_export("flaviagiammarino/vqa-rad", "main", folder)   # network

An export of VQA-RAD or PathVQA has no answer types: a plain yes or no counts as closed. Hub exports leave rows out and merge others, so
that their figures are not those of the native files.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgemed.core.errors import DatasetError, HubError, MissingExtraError
from edgemed.core.files import PART_SUFFIX, found_at, os_errors, remove_stale, save_bytes
from edgemed.core.paths import cache_dir
from edgemed.data.rows import ImageFolder, Row, answer_type, each, field, plain, split_names
from edgemed.data.samples import Sample

_SAVED = ("dataset_dict.json", "state.json")


def is_export(folder: Path) -> bool:
    """Whether `folder` holds parquet files or a saved Dataset."""
    return folder.is_dir() and (any((folder / name).is_file() for name in _SAVED) or bool(_parquet(folder)))


def read_export(name: str, folder: Path, split: str, problems: list[DatasetError] | None = None) -> list[Sample]:
    """All samples of a split; English ones where a language is given. Raises DatasetError, MissingExtraError."""
    images = ImageFolder(folder)

    def make(position: int, row: Row) -> Sample | None:
        if row.get("q_lang") not in (None, "en"):
            return None
        answer = field(row, "answer", folder, position)
        native = plain(row.get("answer_type") or "").strip()
        kind = answer_type(native, answer)
        number = plain(row.get("qid", row.get("id", f"{split}-{position}")))
        question = field(row, "question", folder, position)
        image = _image(row, folder, position, images)
        return Sample.single(f"{name}-{number}", image, question, answer, kind, native_type=native)

    samples: list[Sample] = each(_rows(folder, split), make, folder, problems)
    return samples


def _image(row: Row, folder: Path, position: int, images: ImageFolder) -> Path:
    value = row.get("image", row.get("img_name"))
    if isinstance(value, str):
        return images.find(value)
    data = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(data, bytes):
        return _keep(data)
    if isinstance(value, dict) and value.get("path"):
        return images.find(str(value["path"]))
    raise DatasetError(
        f"Expected an image in row {position} of {folder}, found {type(value).__name__}.",
        "Check the export's columns: image, question, answer.",
    )


def _keep(data: bytes) -> Path:
    """An image's own bytes as a file of the cache, named by their hash. Decoders go by the content, so that any ending will do."""
    digest = hashlib.sha256(data).hexdigest()
    path = cache_dir() / "exports" / digest[:2] / f"{digest}.img"
    if not path.is_file():
        save_bytes(path, data)
    return path


def _parquet(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.parquet"), *folder.glob("*/*.parquet")])


def _datasets() -> Any:
    try:
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        import datasets
    except ImportError as error:
        raise MissingExtraError.of("Reading a hub export", "datasets") from error
    return datasets


def _rows(folder: Path, split: str) -> Iterable[Row]:
    datasets = _datasets()
    if any((folder / name).is_file() for name in _SAVED):
        loaded = datasets.load_from_disk(str(folder))
        parts = dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {split: loaded}
        chosen = next((parts[name] for name in split_names(split) if name in parts), None)
    else:
        files = [str(p) for p in _parquet(folder) if any(p.name.startswith((f"{n}-", f"{n}.", f"{n}_")) for n in split_names(split))]
        parts = {p.name.split("-")[0]: None for p in _parquet(folder)}
        # Streaming reads the files themselves and leaves no second copy in a cache.
        chosen = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True) if files else None
    if chosen is None:
        raise DatasetError(f"Expected the split '{split}' in {folder}, found {', '.join(parts)}.", "Check the split's name.")
    if isinstance((chosen.features or {}).get("image"), datasets.Image):
        chosen = chosen.cast_column("image", datasets.Image(decode=False))  # the file's own bytes; edgemed/core/images.py decodes
    rows: Iterable[Row] = chosen
    return rows


def pull_export(repo: str, revision: str, folder: Path) -> dict[str, int]:
    """Download a data set of a hub into `folder`, whole or not at all; rows by split. Raises HubError, DatasetError."""
    datasets = _datasets()
    if os.path.lexists(folder):
        raise DatasetError(f"Expected nothing at {folder} yet, found {found_at(folder)}.", "Name another with --out.")
    with os_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder.parent, f".{glob.escape(folder.name)}.*{PART_SUFFIX}")  # nothing goes on with them
        part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=PART_SUFFIX, dir=folder.parent))
    try:
        with _hub_errors(repo):
            logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # what fails is told in a sentence
            loaded = datasets.load_dataset(repo, revision=revision, cache_dir=str(part / "cache"))
        with os_errors(folder):
            loaded.save_to_disk(str(part / "data"))
            (part / "data").replace(folder)
        return {name: len(rows) for name, rows in loaded.items()}
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """The border where what `datasets` raises becomes ours; a network that is down is an OSError there."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (OSError, ValueError, RuntimeError, HfHubHTTPError) as error:
        what = " ".join(str(error).split())[:200]
        raise HubError(f"Expected the data set {repo} on the hub, found: {what.rstrip('.')}.", "Check its name and the network.") from error
