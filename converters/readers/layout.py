"""What a layout's two steps hand to one another: tensors by group, with the configuration they belong to.

`load` finds weights and sorts them by name, adapters and deltas are put on top, `read` makes the Checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint import Checkpoint
from converters.readers.assemble import Options
from converters.readers.names import Groups
from converters.readers.store import read_json
from converters.tokenizers import TOKENIZER_FILES
from edgemed.core.errors import CheckpointError
from edgemed.core.files import os_errors


@dataclass(frozen=True)
class Source:
    """A checkpoint before its specs are built. `folder` holds config, tokenizer and processor; `weights` lists the files."""

    folder: Path
    config: dict[str, Any]
    groups: Groups
    weights: tuple[Path, ...]
    # Where the base's weights (and, for want of its own, the tokenizer) are: an adapter's folder has none.
    root: Path
    delta: bool = False

    @property
    def tokenizer_folder(self) -> Path:
        own = any((self.folder / name).is_file() for name in TOKENIZER_FILES)
        return self.folder if own else self.root


@dataclass(frozen=True)
class Layout:
    """How the weights of one layout are found, and how they are read."""

    load: Callable[[Path], tuple[Groups, tuple[Path, ...]]]
    read: Callable[[Source, Options], Checkpoint]


def optional_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where the file is not there."""
    return read_json(path) if path.is_file() else {}


def saved_jinja(folder: Path) -> str | None:
    """The chat template that a checkpoint carries, wherever transformers has put it."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        with os_errors(path):
            return path.read_text(encoding="utf-8", errors="replace")
    for name in ("chat_template.json", "tokenizer_config.json"):
        value = optional_json(folder / name).get("chat_template")
        if isinstance(value, str):
            return value
    return None


def image_processor(folder: Path) -> dict[str, Any]:
    """preprocessor_config.json, or the part of processor_config.json that replaced it in 5.x."""
    nested = optional_json(folder / "processor_config.json").get("image_processor")
    return optional_json(folder / "preprocessor_config.json") or (nested if isinstance(nested, dict) else {})


def section(config: dict[str, Any], key: str, folder: Path) -> dict[str, Any]:
    """A nested object of config.json. Raises CheckpointError."""
    value = config.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(
            f"Expected an object '{key}' in {folder / 'config.json'}, found {json.dumps(value)}.", "Save the checkpoint again."
        )
    return value
