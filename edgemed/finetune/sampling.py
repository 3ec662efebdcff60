"""An order of examples in which those of like length share a batch, so that little is padded; the same for the same seed and epoch.

    sampler = LengthGroups(examples.lengths, group=batch_size, seed=recipe.seed)
    sampler.set_epoch(3)

Rows are shuffled, cut into pools of many batches, sorted by length within a pool, and the batches of a pool shuffled: every epoch has
other batches, each row comes once, and the first batch is the longest, so that a batch that does not fit the memory fails at once.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

# Batches sorted together: more pad less and mix less.
POOL_BATCHES = 50


class LengthGroups(Sampler[int]):
    """Indices of all rows. `group`: how many consecutive ones should be alike, the rows of a step on all devices."""

    def __init__(self, lengths: Sequence[int], group: int, seed: int = 0) -> None:
        self.lengths, self.group, self.seed, self.epoch = lengths, group, seed, 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """The data loader calls it; the order follows from it and the seed alone."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        draw.shuffle(order)
        size = POOL_BATCHES * self.group
        batches: list[list[int]] = []
        for start in range(0, len(order), size):
            pool = sorted(order[start : start + size], key=lambda i: self.lengths[i], reverse=True)
            batches += [pool[k : k + self.group] for k in range(0, len(pool), self.group)]
        whole = [b for b in batches if len(b) == self.group]
        rest = [b for b in batches if len(b) < self.group]  # only the end of an epoch may be a smaller batch
        draw.shuffle(whole)
        if whole:
            longest = max(range(len(whole)), key=lambda k: self.lengths[whole[k][0]])
            whole[0], whole[longest] = whole[longest], whole[0]
        for batch in whole + rest:
            yield from batch
