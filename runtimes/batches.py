"""From slots' parts to one batch: what several sequences would run alike is run once, for all of them.

Two sequences may share a row only where all their cells so far are the same cells of the cache, not merely equal ones: llama.cpp computes
the row with the cells of one of its sequences, and of the others compares no more than how long they are. Questions about one image
begin alike ("What …", "Is …"), and their image is shared already.

llama.cpp's batches are all token ids or all rows of numbers, so that one with an image in it has rows of its text, too. Knows no
llama.cpp.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from runtimes.jobs import Part, new_places
from runtimes.prompt import locate_row

F32 = NDArray[np.float32]
TokenRows = Callable[[Sequence[int]], F32]


@dataclass
class Batch:
    """Rows with their cells, positions and sequences; for each part its rows and where the cache keeps its cells."""

    cells: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)

    @property
    def ends(self) -> list[int]:
        """Each part's last row."""
        return [rows[-1] for rows in self.rows]


def lay_out(parts: Sequence[Part], joint: bool = True) -> Batch:
    """The parts' cells, in order, as rows. `joint`: what several would run alike is run once."""
    if len(parts) == 1:  # nothing to share with, and of a prompt hundreds of cells
        (part,) = parts
        n, start, places = len(part.cells), len(part.slot.cells), new_places(len(part.cells))
        return Batch(list(part.cells), list(range(start, start + n)), [[part.slot.index] for _ in places], [list(range(n))], [places])
    batch = Batch()
    # A row by the place of the cell before it and its own cell; places by row.
    known: dict[tuple[int, int], int] = {}
    places = new_places(sum(len(part.cells) for part in parts))
    for part in parts:
        start = len(part.slot.cells)
        rows: list[int] = []
        before = part.slot.places[-1] if start else -1
        for at, cell in enumerate(part.cells):
            row = known.setdefault((before, cell), len(batch.cells)) if joint else len(batch.cells)
            if row == len(batch.cells):
                batch.cells.append(cell)
                batch.positions.append(start + at)
                batch.sequences.append([])
            batch.sequences[row].append(part.slot.index)
            before = places[row]
            rows.append(row)
        batch.rows.append(rows)
        batch.places.append([places[row] for row in rows])
    return batch


def drop_spill(parts: Sequence[Part], tile: int, others_wait: bool = False) -> list[Part]:
    """The parts without the prompts' last rows, at most half a tile, that spill over whole tiles of rows.

    As they are where that saves nothing or costs a batch: where more rows spill over, where answers fill the tiles and prompts would
    hardly move, and where nothing but what is left would be run next: no part that is not cut, and no others that wait for these.
    """
    if tile == 1 or sum(len(part.cells) for part in parts) < tile:
        return list(parts)
    batch = lay_out(parts)
    whole = len(batch.cells) // tile * tile
    answers = len({row for part, rows in zip(parts, batch.rows, strict=True) if not part.slot.filling for row in rows})
    if whole - answers < tile // 2 or len(batch.cells) - whole > tile // 2:
        return list(parts)
    kept, goes_on = [], others_wait
    for part, rows in zip(parts, batch.rows, strict=True):
        # Rows are numbered upwards along a part, so that what stays is its beginning.
        stays = sum(row < whole for row in rows) if part.slot.filling else len(rows)
        if stays == len(rows):
            kept.append(part)
            goes_on = True
        elif stays:
            kept.append(replace(part, cells=part.cells[:stays], last=False))
    return kept if goes_on else list(parts)


def find_images(cells: Sequence[int], parts: Sequence[Part]) -> list[tuple[int, F32]]:
    """Where images' rows are among the cells: (which cell is the first, float32 [any, width]), in order."""
    images = {locate_row(p.job.prompt.cells[s.start])[0]: p.job.rows[s.key] for p in parts for s in p.job.prompt.spans}
    found: list[tuple[int, F32]] = []
    at, n = 0, len(cells)
    while at < n:
        end = at + 1
        if cells[at] < 0:
            while end < n and cells[end] == cells[end - 1] - 1:
                end += 1
            image, first = locate_row(cells[at])
            found.append((at, images[image][first : first + end - at]))
        at = end
    return found


def list_rows(cells: Sequence[int], parts: Sequence[Part], embed: TokenRows | None) -> list[F32]:
    """The cells' rows in order, float32 [any, width] each: of the images where they lie. `embed` makes those of token ids, if any."""
    found: list[F32] = []
    at = 0
    for first, rows in find_images(cells, parts):
        if at < first:
            assert embed is not None  # without it, a batch has cells of one kind
            found.append(embed(cells[at:first]))
        found.append(rows)
        at = first + len(rows)
    if at < len(cells):
        assert embed is not None
        found.append(embed(cells[at:]))
    return found
