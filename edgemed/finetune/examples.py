"""Samples → token ids, labels and pixels: what a training step is fed.

The text between images is tokenised in one piece (edgemed/core/conversation.py), as the runtime does; tokens of segments marked as
answers are learned, everything else is masked.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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


@dataclass(frozen=True)
class Row:
    """What one sequence of a batch holds. `starts` are the positions at which packed questions begin; empty: one conversation.

    `names` are the samples' ids, for messages.
    """

    ids: list[int]
    labels: list[int]
    image: Path | None
    starts: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


def pack_rows(rows: Iterable[Row], limit: int, seed: int, image_id: int, max_tokens: int) -> list[Row]:
    """Up to `limit` questions about one image behind one copy of it, in an order drawn from `seed`.

    Each question sees the image and itself only (`Collator` writes the mask and the positions), so that the loss is the sum of the
    single rows' losses, while the image's tokens pass through the model once for all.
    """
    heads: dict[tuple[Path | None, tuple[int, ...]], list[Row]] = {}
    alone = []
    for row in rows:
        shared = len(row.ids) - row.ids[::-1].index(image_id) if image_id in row.ids else 0
        if shared:
            heads.setdefault((row.image, tuple(row.ids[:shared])), []).append(row)
        else:
            alone.append(row)
    draw = random.Random(seed)
    for (_, head), group in heads.items():
        draw.shuffle(group)
        while group:
            row = group.pop()
            ids, labels, starts, names = list(row.ids), list(row.labels), [len(head)], row.names
            while group and len(starts) < limit and len(ids) + len(group[-1].ids) - len(head) <= max_tokens:
                more = group.pop()
                starts.append(len(ids))
                ids += more.ids[len(head) :]
                labels += more.labels[len(head) :]
                names += more.names
            alone.append(Row(ids, labels, row.image, tuple(starts), names))
    return alone


def _capitalise(turn: Turn) -> Turn:
    return replace(turn, text=turn.text[:1].upper() + turn.text[1:])


class Examples(Dataset[Row]):
    """Sets of samples ready for a step. Images are prepared once and kept as uint8 (150 kB each at 224 px)."""

    def __init__(
        self,
        sets: Sequence[tuple[Sequence[Sample], int]],
        tokenizer: Any,
        template: ConversationTemplate,
        image: ImagePreparation,
        image_id: int,
        image_tokens: int,
        max_tokens: int,
        capitalise: bool = False,
        pack: int = 1,
        seed: int = 0,
    ) -> None:
        """`sets`: (samples, how often they are seen an epoch). Raises DatasetError."""
        self.rows: list[Row] = []
        for samples, repeat in sets:
            rows = []
            for sample in samples:
                turns = [_capitalise(t) if capitalise and t.role == "assistant" else t for t in sample.turns]
                ids, labels = encode(tokenizer, template, turns, image_id, image_tokens)
                check_labels(tokenizer, template, turns, labels, sample.id)
                if len(ids) > max_tokens:
                    raise DatasetError(
                        f"Expected at most {max_tokens} tokens in {sample.id}, found {len(ids)}.", "Raise max_tokens or shorten the row."
                    )
                rows.append(Row(ids, labels, sample.image, names=(sample.id,)))
            for again in range(repeat):
                self.rows += pack_rows(rows, pack, seed + again, image_id, max_tokens) if pack > 1 else rows
        paths = list(dict.fromkeys(row.image for row in self.rows if row.image))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes and resizes without the interpreter's lock
            prepared = pool.map(lambda path: torch.from_numpy(prepare(load_image(path), image)), paths)
            self.pixels = dict(zip(paths, prepared, strict=True))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Row, torch.Tensor | None]:
        row = self.rows[index]
        return row, self.pixels[row.image] if row.image else None


class Collator:
    """Rows → padded tensors: input_ids, labels int64 [batch, tokens] (padded right), pixels uint8 [images, S, S, 3], and a mask.

    The mask is int64 [batch, tokens], 0 where padded; with packed rows bool [batch, 1, tokens, tokens], true where a token (third
    axis) sees another (fourth), and position_ids int64 [batch, tokens] go with it. Where asked for, `names` are the rows' samples.
    """

    def __init__(self, pad_id: int, names: bool = False) -> None:
        self.pad_id, self.names = pad_id, names

    def __call__(self, rows: Sequence[tuple[Row, torch.Tensor | None]]) -> dict[str, Any]:
        length = max(len(row.ids) for row, _ in rows)
        ids = torch.full((len(rows), length), self.pad_id)
        labels = torch.full((len(rows), length), IGNORE)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, (row, _) in enumerate(rows):
            n = len(row.ids)
            ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row.ids), torch.tensor(row.labels), 1
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if any(len(row.starts) > 1 for row, _ in rows):
            batch |= _pack_masks([row for row, _ in rows], length)
        pixels = [image for _, image in rows if image is not None]
        if pixels:
            batch["pixels"] = torch.stack(pixels)
        return batch | ({"names": [row.names for row, _ in rows]} if self.names else {})


def _pack_masks(rows: Sequence[Row], length: int) -> dict[str, torch.Tensor]:
    """The mask and the positions of packed rows. Padding sees what comes before it: a row of nothing but false is NaN in attention."""
    question = torch.zeros((len(rows), length), dtype=torch.long)  # 0: the shared head
    positions = torch.arange(length).repeat(len(rows), 1)
    for i, row in enumerate(rows):
        for number, start in enumerate(row.starts, start=1):
            question[i, start:] = number
            positions[i, start:] = torch.arange(length - start) + row.starts[0]
    same = question[:, :, None] == question[:, None, :]
    seen = torch.tril(same | (question == 0)[:, None, :])
    return {"attention_mask": seen[:, None], "position_ids": positions}
