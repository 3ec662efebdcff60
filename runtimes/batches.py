"""From slots' parts to one batch of token ids: what several sequences would run alike is run once, for all of them.

Two sequences may share a row only where all their cells so far are the same cells of the cache, not merely equal ones: llama.cpp computes
the row with the cells of one of its sequences, and of the others compares no more than how long they are. Questions about one image
begin alike ("What …", "Is …"), and their image is shared already. Knows no llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from runtimes.jobs import Part, new_places


@dataclass
class TextBatch:
    """Rows with their tokens, positions and sequences; for each part its row at the end and where the cache keeps its cells."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    sequences: list[list[int]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    places: list[list[int]] = field(default_factory=list)


def lay_out(parts: Sequence[Part]) -> TextBatch:
    """The parts' cells, in order, as rows."""
    batch = TextBatch()
    # A row by the place of the cell before it and its token; places by row.
    known: dict[tuple[int, int], int] = {}
    places = new_places(sum(len(part.cells) for part in parts))
    for part in parts:
        start, mine = len(part.slot.cells), []
        before = part.slot.places[-1] if start else -1
        for at, token in enumerate(part.cells):
            row = known.setdefault((before, token), len(batch.tokens))
            if row == len(batch.tokens):
                batch.tokens.append(token)
                batch.positions.append(start + at)
                batch.sequences.append([])
            batch.sequences[row].append(part.slot.index)
            before = places[row]
            mine.append(before)
        batch.ends.append(row)
        batch.places.append(mine)
    return batch
