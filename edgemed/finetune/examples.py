"""Samples → token ids, labels and pixels: what a training step is fed.

The text between images is tokenised in one piece (edgemed/core/conversation.py), as the runtime does; tokens of segments marked as
answers are learned, everything else is masked.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from edgemed.core.conversation import ConversationTemplate, ImageSlot, Text, Turn, render, split_chunks
from edgemed.core.errors import DatasetError
from edgemed.core.images import ImagePreparation, load_image, prepare
from edgemed.data import Sample

IGNORE = -100


def encode(
    tokenizer: Any, template: ConversationTemplate, turns: Sequence[Turn], image_id: int, image_tokens: int
) -> tuple[list[int], list[int]]:
    """(input ids, labels) of a conversation; an image is `image_tokens` times `image_id`. Labels are IGNORE outside answers."""
    ids: list[int] = [tokenizer.bos_token_id] if template.bos else []
    labels = [IGNORE] * len(ids)
    for chunk in split_chunks(render(template, turns)):
        if isinstance(chunk, tuple):
            piece, learned = _encode_chunk(tokenizer, chunk)
        else:
            piece, learned = [image_id] * image_tokens, [IGNORE] * image_tokens
        ids += piece
        labels += learned
    return ids, labels


def _encode_chunk(tokenizer: Any, texts: Sequence[Text]) -> tuple[list[int], list[int]]:
    """(ids, labels) of texts that are tokenised as one string."""

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    whole = tokenize("".join(text.text for text in texts))
    labels: list[int] = []
    for count, text in enumerate(texts, start=1):
        # a text ends where the ids of all up to it stop being those of the whole
        ids = whole if count == len(texts) else tokenize("".join(t.text for t in texts[:count]))
        end = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
        new = whole[len(labels) : end]
        labels += new if text.answer else [IGNORE] * len(new)
    return whole, labels


def check_labels(tokenizer: Any, template: ConversationTemplate, turns: Sequence[Turn], labels: Sequence[int], sample_id: str) -> None:
    """Raise DatasetError unless the learned tokens read as exactly the answers: a template and labels that drift apart train nonsense."""
    learned = tokenizer.decode([i for i in labels if i != IGNORE], skip_special_tokens=False)
    answers = "".join(s.text for s in render(template, turns) if not isinstance(s, ImageSlot) and s.answer)
    if "".join(learned.split()) != "".join(answers.split()):
        raise DatasetError(
            f"Expected the labels of {sample_id} to read '{answers[:60]}', found '{learned[:60]}'.",
            "The template does not fit this tokenizer; choose the template that the model was made for.",
        )


def join_rounds(samples: Sequence[Sample], rounds: int, seed: int) -> list[Sample]:
    """Samples of one image joined into conversations of at most `rounds` questions, in an order drawn from `seed`."""
    if rounds == 1:
        return list(samples)
    by_image: dict[Path | None, list[Sample]] = {}
    for sample in samples:
        by_image.setdefault(sample.image, []).append(sample)
    draw, joined = random.Random(seed), []
    for image, group in by_image.items():
        draw.shuffle(group)
        size = rounds if image else 1
        joined += [_join(group[start : start + size]) for start in range(0, len(group), size)]
    return joined


def _join(group: Sequence[Sample]) -> Sample:
    first, *rest = group
    later = [replace(turn, images=0) for sample in rest for turn in sample.turns]
    return replace(first, id="+".join(s.id for s in group), turns=(*first.turns, *later))


def _capitalise(turn: Turn) -> Turn:
    return replace(turn, text=turn.text[:1].upper() + turn.text[1:])


class Examples(Dataset[dict[str, Any]]):
    """Samples ready for a step. Images are prepared once and kept as uint8 (150 kB each at 224 px)."""

    def __init__(
        self,
        samples: Sequence[Sample],
        tokenizer: Any,
        template: ConversationTemplate,
        image: ImagePreparation,
        image_id: int,
        image_tokens: int,
        max_tokens: int,
        capitalise: bool = False,
    ) -> None:
        self.rows: list[tuple[list[int], list[int], Path | None]] = []
        for sample in samples:
            turns = [_capitalise(t) if capitalise and t.role == "assistant" else t for t in sample.turns]
            ids, labels = encode(tokenizer, template, turns, image_id, image_tokens)
            check_labels(tokenizer, template, turns, labels, sample.id)
            if len(ids) > max_tokens:
                raise DatasetError(
                    f"Expected at most {max_tokens} tokens in {sample.id}, found {len(ids)}.", "Raise max_tokens or shorten the row."
                )
            self.rows.append((ids, labels, sample.image))
        paths = list(dict.fromkeys(s.image for s in samples if s.image))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes without the interpreter's lock
            prepared = pool.map(lambda path: torch.from_numpy(prepare(load_image(path), image)), paths)
            self.pixels = dict(zip(paths, prepared, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, labels, path = self.rows[index]
        return {"input_ids": ids, "labels": labels, "pixels": self.pixels[path] if path else None}


class Collator:
    """Rows → padded tensors: input_ids, attention_mask, labels int64 [batch, tokens] (padded right), pixels uint8 [images, S, S, 3]."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), length), self.pad_id)
        labels = torch.full((len(rows), length), IGNORE)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, row in enumerate(rows):
            n = len(row["input_ids"])
            ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row["input_ids"]), torch.tensor(row["labels"]), 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        pixels = [row["pixels"] for row in rows if row["pixels"] is not None]
        if pixels:
            batch["pixels"] = torch.stack(pixels)
        return batch
