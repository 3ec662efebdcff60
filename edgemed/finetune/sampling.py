"""Which rows each step sees: one endless shuffle, cut into steps, so that it does not depend on how many processes share a step.

An epoch's end lies wherever it falls, inside a step if need be. Knows no tensors.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

# Steps whose rows are sorted by length together: enough for little padding, few enough for varied steps.
WINDOW_STEPS = 50


class StepSampler(Sampler[int]):
    """Row numbers of a whole run: `steps` × `rows_per_step`. With `group`, rows of one step are of like length."""

    def __init__(self, lengths: Sequence[int], rows_per_step: int, steps: int, seed: int, group: bool = False) -> None:
        self.lengths, self.rows_per_step, self.steps, self.seed, self.group = lengths, rows_per_step, steps, seed, group

    def __len__(self) -> int:
        return self.steps * self.rows_per_step

    def __iter__(self) -> Iterator[int]:
        stream = self._grouped() if self.group else self._shuffled()
        return itertools.islice(stream, len(self))

    def _shuffled(self) -> Iterator[int]:
        for epoch in itertools.count():
            order = list(range(len(self.lengths)))
            random.Random(f"{self.seed}-{epoch}").shuffle(order)
            yield from order

    def _grouped(self) -> Iterator[int]:
        stream = itertools.islice(self._shuffled(), len(self))  # so that the last window, too, shows all of its rows
        for number in range(-(-self.steps // WINDOW_STEPS)):
            window = sorted(itertools.islice(stream, WINDOW_STEPS * self.rows_per_step), key=lambda row: self.lengths[row])
            steps = [window[i : i + self.rows_per_step] for i in range(0, len(window), self.rows_per_step)]
            random.Random(f"{self.seed}-window-{number}").shuffle(steps)
            for step in steps:
                yield from step
