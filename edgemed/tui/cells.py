"""Pictures out of ordinary terminal cells: half blocks in two colours, or shades of characters where there are no colours.

    surface = CellSurface(blocks=True)
    surface.put(surface.encode(image))       # an RGB image of 1 × 2 (blocks) or 1 × 1 pixels a cell

textual-image has these two as well, but reads pixels one by one through a call that Pillow 13 deprecates and 14 drops; here `encode`
may run in a worker thread and the screen's thread only hands out finished lines.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image
from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip
from textual.widget import Widget

# From dark to bright on a dark background; all of them are ASCII, so that the barest terminal has them.
SHADES = " .:-=+*#%@"


@lru_cache(maxsize=16384)
def _style(upper: tuple[int, int, int], lower: tuple[int, int, int]) -> Style:
    return Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower))


def block_lines(image: Image.Image) -> list[Strip]:
    """Two rows of pixels a line: the upper half of "▀" is the first, its background the second."""
    rows = np.asarray(image.convert("RGB"), dtype=np.uint8)[: image.height // 2 * 2].tolist()
    return [_block_line([tuple(p) for p in upper], [tuple(p) for p in lower]) for upper, lower in zip(rows[::2], rows[1::2], strict=True)]


def _block_line(upper: list[tuple[int, int, int]], lower: list[tuple[int, int, int]]) -> Strip:
    segments: list[Segment] = []
    start = 0
    pairs = list(zip(upper, lower, strict=True))
    for end in range(1, len(pairs) + 1):
        # Equal neighbours share a segment: the black around a radiograph costs a few bytes, which counts over SSH.
        if end == len(pairs) or pairs[end] != pairs[start]:
            segments.append(Segment("▀" * (end - start), _style(*pairs[start])))
            start = end
    return Strip(segments, len(pairs))


def shade_lines(image: Image.Image) -> list[Strip]:
    """One character a pixel, by its brightness."""
    grey = np.asarray(image.convert("L"), dtype=np.uint16)
    picked = (grey * len(SHADES) // 256).tolist()
    return [Strip([Segment("".join(SHADES[shade] for shade in row))], len(row)) for row in picked]


class CellSurface(Widget):
    """Shows the lines that it was given last; blank where there are none."""

    def __init__(self, blocks: bool) -> None:
        super().__init__(classes="surface")
        self.blocks = blocks
        self._lines: list[Strip] = []

    def encode(self, image: Image.Image) -> list[Strip]:
        """The lines of an image; touches nothing, so any thread may call it."""
        return block_lines(image) if self.blocks else shade_lines(image)

    def put(self, lines: list[Strip] | None) -> None:
        self._lines = lines or []
        self.refresh()

    def render_line(self, y: int) -> Strip:
        width = self.content_size.width
        if y >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        # The widget may have another size than the picture was drawn for, until the next drawing arrives.
        return self._lines[y].adjust_cell_length(width, self.rich_style)
