"""From segments to cells: what stands at each position of a sequence, one integer each.

A text cell is its token id. An image row's cell is a negative number made of the image's hash and the row, so that two prompts
share a prefix exactly where their cells are equal. Knows the manifest's rules on BOS and blanks, no cache and no batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgemed.core.conversation import ConversationTemplate, ImageSlot, Text, split_chunks
from edgemed.core.errors import InputError
from edgemed.core.manifest import Manifest

# Stands for an image in lists of token ids, as in LLaVA.
IMAGE_TOKEN = -200
_ROW_BITS = 20
_HASH_DIGITS = 15


@dataclass(frozen=True)
class Span:
    """Where an image's rows lie."""

    start: int
    key: str


@dataclass(frozen=True)
class Prompt:
    """A sequence's cells and the images in it."""

    cells: list[int]
    spans: tuple[Span, ...]


def tokenize_segments(
    segments: Sequence[Text | ImageSlot | int], manifest: Manifest, tokenize: Callable[[str], list[int]], bos: int
) -> list[int | ImageSlot]:
    """Token ids, with image slots where they stand. Texts between images are tokenised as one; bare ids pass through.

    BOS comes first where the template says so, but not before bare ids. SentencePiece's leading blank is put in front of what
    `manifest.space_prefix` names ("first", "chunk"), where the model was loaded not to do so itself; "each" is llama.cpp's own way.
    """
    out: list[int | ImageSlot] = []
    if manifest.template.bos and segments and not isinstance(segments[0], int):
        out.append(bos)
    for index, chunk in enumerate(split_chunks(segments)):
        if not isinstance(chunk, tuple):
            out.append(chunk)
            continue
        text = "".join(part.text for part in chunk)
        blank = manifest.space_prefix == "chunk" or (manifest.space_prefix == "first" and index == 0)
        out.extend(tokenize(" " + text if blank and not _starts_with_control(text, manifest.template, tokenize) else text))
    return out


def _starts_with_control(text: str, template: ConversationTemplate, tokenize: Callable[[str], list[int]]) -> bool:
    """Whether a control token comes first: these tokenizers put a blank in front of text alone."""
    marks = (*template.control, template.image_prefix, template.image_suffix)
    return any(mark and text.startswith(mark) and len(tokenize(mark)) == 1 for mark in marks)


def build_prompt(items: Sequence[int | ImageSlot], image_keys: Sequence[str], image_tokens: int) -> Prompt:
    """Lay tokens and images out as cells. Raises InputError where a slot has no image."""
    cells: list[int] = []
    spans: list[Span] = []
    for item in items:
        if isinstance(item, int):
            if item < 0:
                raise InputError(f"Expected token ids of at least 0, found {item}.", "Use an ImageSlot for an image.")
            cells.append(item)
            continue
        if not 0 <= item.index < len(image_keys):
            raise InputError(f"Expected an image for slot {item.index}, found {len(image_keys)} image(s).", "Hand over all images.")
        key = image_keys[item.index]
        spans.append(Span(len(cells), key))
        base = -((int(key[:_HASH_DIGITS], 16) + 1) << _ROW_BITS)
        cells.extend(base - row for row in range(image_tokens))
    return Prompt(cells, tuple(spans))


def locate_row(cell: int) -> tuple[int, int]:
    """Of an image row's cell: a number that stands for the image's hash, and which of its rows it is."""
    return divmod(-cell, 1 << _ROW_BITS)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix. Compares slices, so that the loop runs in C."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
