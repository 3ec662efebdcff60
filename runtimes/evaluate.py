"""A batch's cells to llama.cpp, whichever way they go; and logits of one sequence, run alone: what parity checks and `verify` compare.

Knows no queue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgemed.core.errors import EngineError
from runtimes.batches import find_images, list_rows
from runtimes.jobs import Job, Part, Slot
from runtimes.libllama import LanguageModel

F32 = NDArray[np.float32]


def evaluate(llm: LanguageModel, job: Job, slot: Slot, kept: int, after_batch: Callable[[], None]) -> F32:
    """float32 [cells, vocab], or [last, vocab] of the last cells. `slot` is idle and holds `kept` cells, and is left full.

    `after_batch` is called after each batch. Raises EngineError.
    """
    cells = job.prompt.cells
    first = 0 if job.all_positions else max(0, len(cells) - job.last)
    out: F32 = np.empty((len(cells) - first, llm.vocab_size), np.float32)
    slot.start(job, kept, len(cells))
    while (start := len(slot.cells)) < len(cells):
        skip = max(0, first - start)
        # Every output row needs room in llama.cpp's buffers, so few at a time.
        n = _run_part(llm, slot, min(skip + llm.max_outputs, llm.batch_tokens), skip)
        for i in range(skip, n):
            out[start - first + i] = llm.logits(i)
        slot.add(cells[start : start + n])
        after_batch()
    return out


def decode(
    llm: LanguageModel,
    parts: Sequence[Part],
    cells: Sequence[int],
    positions: Sequence[int],
    sequences: Sequence[Sequence[int]],
    outputs: Sequence[int],
) -> int:
    """Run the cells of these parts in one batch: as rows, or among tokens, where an image is among them. Returns llama_decode's code."""
    if min(cells) >= 0:
        return llm.decode_tokens(cells, positions, sequences, outputs)
    if llm.takes_rows:
        return llm.decode_among([max(cell, 0) for cell in cells], find_images(cells, parts), positions, sequences, outputs)
    return llm.decode_rows(list_rows(cells, parts, llm.token_rows), positions, sequences, outputs)


def _run_part(llm: LanguageModel, slot: Slot, room: int, skip: int) -> int:
    """Run the next cells, at most `room`, with logits of all but the first `skip`; returns how many."""
    start, part = len(slot.cells), slot.next_part(room, mixed=llm.token_rows is not None)
    n = len(part.cells)
    positions, sequences, outputs = range(start, start + n), [[slot.index]] * n, range(skip, n)
    code = decode(llm, [part], part.cells, positions, sequences, outputs)
    if code != 0:
        raise batch_error(code)
    return n


def batch_error(code: int) -> EngineError:
    """What llama_decode's codes other than 0 become."""
    return EngineError(f"llama.cpp could not run a batch (code {code}).", "Try again with a smaller context or fewer slots.")
