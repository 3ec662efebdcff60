"""Samples → token ids, labels and pixels: what a training step is fed.

The text between images is tokenised in one piece (edgemed/core/conversation.py), as the runtime does; tokens of segments marked as
answers are learned, everything else is masked.
"""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from edgemed.core.conversation import ConversationTemplate, ImageSlot, Text, Turn, render, split_chunks
from edgemed.core.errors import DatasetError, ImageError
from edgemed.core.images import ImagePreparation
from edgemed.data import Sample
from edgemed.finetune.features import Compute, FeatureCache, Progress
from edgemed.finetune.pictures import BrokenImages, Pictures

IGNORE = -100
# Prepared images are kept in memory up to this: 26,000 of 224 px, 9,000 of 384 px.
PRELOAD_BYTES = 4_000_000_000
# Putting 16 rows' features together was seen to take 0.17 s, two thirds of the GPU's time for them (docs/LOG.md, 2026-11-28).
READY_WORKERS = 2


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

    `names` are the samples' ids, for messages; `mirrored` tells how the image is meant.
    """

    ids: list[int]
    labels: list[int]
    image: Path | None
    starts: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    mirrored: bool = False


@dataclass(frozen=True)
class _Kept:
    """A row as it waits in memory: an image's many equal ids as one, numbers of four bytes."""

    ids: array[int]
    labels: array[int]
    image: Path | None
    starts: tuple[int, ...]
    names: tuple[str, ...]
    mirrored: bool
    # Where the image's ids stand, and how many more there are than the one that is kept.
    fold: tuple[int, int]

    @classmethod
    def of(cls, row: Row, image_id: int) -> _Kept:
        """`row`, folded at its first image."""
        at = row.ids.index(image_id) if image_id in row.ids else len(row.ids)
        end = next((i for i in range(at, len(row.ids)) if row.ids[i] != image_id), len(row.ids))
        cut = slice(at + 1, end)
        ids, labels = array("i", row.ids), array("i", row.labels)
        del ids[cut], labels[cut]
        return cls(ids, labels, row.image, row.starts, row.names, row.mirrored, (at, max(0, end - at - 1)))

    def unfold(self) -> Row:
        """The row again."""
        at, more = self.fold
        ids, labels = self.ids.tolist(), self.labels.tolist()
        ids[at:at], labels[at:at] = ids[at : at + 1] * more, [IGNORE] * more
        return Row(ids, labels, self.image, self.starts, self.names, self.mirrored)

    def __len__(self) -> int:
        return len(self.ids) + self.fold[1]


def pack_rows(rows: Iterable[Row], limit: int, seed: int, image_id: int, max_tokens: int) -> list[Row]:
    """Up to `limit` questions about one image behind one copy of it, in an order drawn from `seed`.

    Each question sees the image and itself only (`Collator` writes the mask and the positions), so that the loss is the sum of the
    single rows' losses, while the image's tokens pass through the model once for all.
    """
    heads: dict[tuple[Path | None, bool, tuple[int, ...]], list[Row]] = {}
    alone = []
    for row in rows:
        shared = len(row.ids) - row.ids[::-1].index(image_id) if image_id in row.ids else 0
        if shared:
            heads.setdefault((row.image, row.mirrored, tuple(row.ids[:shared])), []).append(row)
        else:
            alone.append(row)
    draw = random.Random(seed)
    for (_, mirrored, head), group in heads.items():
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
            alone.append(Row(ids, labels, row.image, tuple(starts), names, mirrored))
    return alone


def _capitalise(turn: Turn) -> Turn:
    return replace(turn, text=turn.text[:1].upper() + turn.text[1:])


Item = tuple[Row, torch.Tensor | None]


class Examples(Dataset[Item]):
    """Sets of samples ready for a step: a row, and its image as `Pictures` hands it out."""

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
        preload_bytes: int = PRELOAD_BYTES,
        max_broken: float = 0.0,
    ) -> None:
        """`sets`: (samples, how often they are seen an epoch). Raises DatasetError.

        Images are decoded here where all of them take at most `preload_bytes` as pixels, else when they are asked for. Rows whose
        image cannot be read are left out, as long as they are at most the share `max_broken` of all images.
        """
        self.rows: list[_Kept] = []
        for samples, repeat in sets:
            rows = (_encode_row(tokenizer, template, s, image_id, image_tokens, max_tokens, capitalise) for s in samples)
            if pack > 1:
                single = list(rows)
                for again in range(repeat):
                    self.rows += [_Kept.of(row, image_id) for row in pack_rows(single, pack, seed + again, image_id, max_tokens)]
            else:
                self.rows += [_Kept.of(row, image_id) for row in rows] * repeat
        self.pictures = Pictures([row.image for row in self.rows if row.image], image, preload_bytes)
        self.broken = BrokenImages(len(self.pictures.paths), max_broken)
        self._drop_broken()

    def use_features(self, cache: FeatureCache, compute: Compute, batch: int = 32, progress: Progress | None = None) -> int:
        """Hand out cached features instead of pixels; how many images did not fit the cache. Raises DatasetError, ResourceError."""
        left_out = self.pictures.use_features(cache, compute, batch, progress)
        self._drop_broken()
        return left_out

    def _drop_broken(self) -> None:
        if self.pictures.broken:
            self.broken.add([str(path) for path in self.pictures.broken])
            self.rows = [row for row in self.rows if row.image not in self.pictures.broken]
        if not self.rows:
            raise DatasetError("Expected at least one row to train on, found none.", "Check the data sets of the recipe.")

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, for a sampler that groups by them."""
        return [len(row) for row in self.rows]

    @property
    def workers(self) -> int:
        """How many loading processes keep a GPU fed. Without a GPU none where nothing is decoded any more: there is nothing to wait for."""
        if not self.pictures.ready:
            return min(8, max(1, (os.cpu_count() or 1) - 1))
        return READY_WORKERS if torch.cuda.is_available() else 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        """The row; where its image cannot be read, the next row that has one, which then names the file."""
        names = []
        for step in range(len(self.rows)):
            row = self.rows[(index + step) % len(self.rows)].unfold()
            try:
                picture = self.pictures[row.image] if row.image else None
                if row.mirrored and picture is not None:
                    picture = picture.flip(1)  # [S, S, 3]; cached features are refused beside mirroring
            except ImageError:
                names.append(str(row.image))
                continue
            return (Broken(row, tuple(names)) if names else row), picture
        raise DatasetError(f"Expected images that can be read, found none in {len(self.rows)} rows.", "Check them: edgemed data check")


class Broken(Row):
    """A row that stands in for others, whose images could not be read: `files`."""

    files: tuple[str, ...]

    def __init__(self, row: Row, files: tuple[str, ...]) -> None:
        super().__init__(row.ids, row.labels, row.image, row.starts, row.names, row.mirrored)
        object.__setattr__(self, "files", files)


def _encode_row(
    tokenizer: Any, template: ConversationTemplate, sample: Sample, image_id: int, image_tokens: int, max_tokens: int, capitalise: bool
) -> Row:
    turns = [_capitalise(t) if capitalise and t.role == "assistant" else t for t in sample.turns]
    ids, labels = encode(tokenizer, template, turns, image_id, image_tokens)
    check_labels(tokenizer, template, turns, labels, sample.id)
    if len(ids) > max_tokens:
        raise DatasetError(
            f"Expected at most {max_tokens} tokens in {sample.id}, found {len(ids)}.", "Raise max_tokens or shorten the row."
        )
    return Row(ids, labels, sample.image, names=(sample.id,), mirrored=sample.mirrored)


class Collator:
    """Rows → padded tensors: input_ids, labels int64 [batch, tokens] (padded right), pixels uint8 [images, S, S, 3], and a mask.

    The mask is int64 [batch, tokens], 0 where padded; with packed rows bool [batch, 1, tokens, tokens], true where a token (third
    axis) sees another (fourth), and position_ids int64 [batch, tokens] go with it. Images that come as cached features are stacked
    in "features" [images, tokens, width], and "order" int64 tells which of features and then pixels is the batch's first, second …
    (edgemed/finetune/features.py takes them apart again). Lengths are padded up to a multiple of `multiple`. What
    a training step wants beside, with `step`: "names" and "broken" hold each row's samples and the unreadable files that it stands in
    for, "first" the first position, from 1 on, at which any row has something to learn.
    """

    def __init__(self, pad_id: int, step: bool = False, multiple: int = 1) -> None:
        self.pad_id, self.step, self.multiple = pad_id, step, multiple

    def __call__(self, rows: Sequence[Item]) -> dict[str, Any]:
        length = -(-max(len(row.ids) for row, _ in rows) // self.multiple) * self.multiple
        ids = torch.full((len(rows), length), self.pad_id)
        labels = torch.full((len(rows), length), IGNORE)
        mask = torch.zeros((len(rows), length), dtype=torch.long)
        for i, (row, _) in enumerate(rows):
            n = len(row.ids)
            ids[i, :n], labels[i, :n], mask[i, :n] = torch.tensor(row.ids), torch.tensor(row.labels), 1
        batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if any(len(row.starts) > 1 for row, _ in rows):
            batch |= _pack_masks([row for row, _ in rows], length)
        batch |= _stack_images([image for _, image in rows if image is not None])
        if self.step:
            # Found here, since a GPU that is asked for it has to finish all that it was given before.
            batch["first"] = max(1, int((labels != IGNORE).any(0).int().argmax()))
            batch["names"] = [row.names for row, _ in rows]
            batch["broken"] = [row.files if isinstance(row, Broken) else () for row, _ in rows]
        return batch


def _stack_images(images: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """uint8 pixels and float features, each stacked; the order only where there are features."""
    cached = [i for i, image in enumerate(images) if image.is_floating_point()]
    fresh = [i for i, image in enumerate(images) if not image.is_floating_point()]
    out = {"pixels": torch.stack([images[i] for i in fresh])} if fresh else {}
    if cached:
        out["features"] = torch.stack([images[i] for i in cached])
        out["order"] = torch.argsort(torch.tensor(cached + fresh))
    return out


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
