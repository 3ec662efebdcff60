"""Whether a model's tokenizer and template fit a data set: what `edgemed data check --model` adds, before a GPU is paid for.

    report = Labeller(folder, "v1").check(samples, max_tokens=2048)

Needs the `train` extra for the tokenizer; loads no weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from edgemed.core.contract import checkpoint_errors, count_image_tokens, load_contract
from edgemed.core.conversation import ConversationTemplate, find_template
from edgemed.core.errors import CheckpointError, DatasetError
from edgemed.core.files import os_errors
from edgemed.data import Sample
from edgemed.finetune.examples import IGNORE, check_labels, encode

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class LabelReport:
    """Tokens of each row and of its answers, and what is wrong: rows that are too long, and labels that are not the answers."""

    template: str
    image_tokens: int
    max_tokens: int
    tokens: tuple[int, ...]
    label_tokens: tuple[int, ...]
    too_long: tuple[str, ...]
    misaligned: tuple[str, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, image included."""
        return max(self.tokens, default=0)

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        lengths = {"tokens": self.tokens, "answer_tokens": self.label_tokens}
        spans = {key: {"median": int(median(found or (0,))), "longest": max(found, default=0)} for key, found in lengths.items()}
        return {"template": self.template, "image_tokens": self.image_tokens, "too_long": len(self.too_long)} | spans

    @property
    def problems(self) -> list[str]:
        """A sentence for each kind of problem, its first case named."""
        out = []
        if self.too_long:
            out.append(f"{len(self.too_long)} rows have more than {self.max_tokens} tokens, the longest {self.longest}: {self.too_long[0]}")
        if self.misaligned:
            out.append(f"{len(self.misaligned)} rows whose labels are not their answers: {self.misaligned[0]}")
        return out


class Labeller:
    """A checkpoint's tokenizer, template and image length, without its weights. Raises CheckpointError, InputError."""

    def __init__(self, folder: Path, template: str | None) -> None:
        path = folder / "config.json"
        if not path.is_file():
            raise CheckpointError(f"Expected an HF checkpoint at {folder}, found no config.json there.", "Check the path after --model.")
        with os_errors(path):
            raw = path.read_bytes()
        try:
            kind = json.loads(raw).get("model_type")
        except (ValueError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"Expected JSON in {path}, found something else ({error}).", "Copy the checkpoint again.") from error
        if kind != "llava":
            raise CheckpointError(f"Expected a LLaVA checkpoint at {folder}, found the model type '{kind}'.", "Name the stage's model.")
        with checkpoint_errors(folder):
            config = AutoConfig.from_pretrained(folder)
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        tower = config.vision_config
        self.image_tokens = count_image_tokens(tower.image_size, tower.patch_size, tower.model_type, config.vision_feature_select_strategy)
        self.image_id = config.image_token_id
        self.template = self._template(folder, template)

    def _template(self, folder: Path, name: str | None) -> ConversationTemplate:
        contract = load_contract(folder)
        if name is None and contract is None:
            raise CheckpointError(
                f"Expected a template in {folder}, found none: the checkpoint was not written by edgemed.", "Name one with --template."
            )
        template = find_template(name) if name else contract.template if contract else None
        assert template is not None
        if template.bos and self.tokenizer.bos_token_id is None:
            raise CheckpointError(
                f"Expected a BOS token for the template '{template.name}', found a tokenizer without one.", "Choose another template."
            )
        return template

    def check(self, samples: Sequence[Sample], max_tokens: int, progress: Progress | None = None) -> LabelReport:
        """Encode every sample as training does."""
        tokens, learned, too_long, misaligned = [], [], [], []
        for done, sample in enumerate(samples, start=1):
            ids, labels = encode(self.tokenizer, self.template, sample.turns, self.image_id, self.image_tokens)
            try:
                check_labels(self.tokenizer, self.template, sample.turns, labels, sample.id)
            except DatasetError as error:
                misaligned.append(error.message)
            tokens.append(len(ids))
            learned.append(sum(label != IGNORE for label in labels))
            if len(ids) > max_tokens:
                too_long.append(sample.id)
            if progress:
                progress("Encoding", done, len(samples))
        return LabelReport(
            self.template.name, self.image_tokens, max_tokens, tuple(tokens), tuple(learned), tuple(too_long), tuple(misaligned)
        )
