"""From segments to cells: what stands at each position of a sequence, one integer each.

A text cell is its token id. An image row's cell is a negative number made of the image's hash and the row, so that two prompts
share a prefix exactly where their cells are equal. Knows the manifest's rules on BOS and blanks, no cache and no batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from edgemed.core.conversation import ImageSlot, Text
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
    """Token ids, with image slots where they stand. Each Text is tokenised on its own; bare ids pass through.

    BOS comes first where the template says so, but not before bare ids. SentencePiece's leading blank is put in front of the
    texts that `manifest.space_prefix` names, since the model was loaded not to do so itself.
    """
    out: list[int | ImageSlot] = []
    if manifest.template.bos and segments and not isinstance(segments[0], int):
        out.append(bos)
    for index, segment in enumerate(segments):
        if isinstance(segment, Text):
            blank = manifest.space_prefix == "each" or (manifest.space_prefix == "first" and index == 0)
            out.extend(tokenize(" " + segment.text if blank else segment.text))
        else:
            out.append(segment)
    return out


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
