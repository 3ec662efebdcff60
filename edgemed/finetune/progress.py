"""How far a stage has come: what it hands to whoever shows it. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """After one optimizer step. `loss` is this step's, `samples_per_s` of the last steps, memory at its highest so far."""

    step: int
    steps: int
    loss: float
    samples_per_s: float
    eta_s: float
    memory_bytes: int


Report = Callable[[Progress], None]
# (what, done, total) of what comes before the first step: the tower's features, where they are cached.
Prepare = Callable[[str, int, int], None]
