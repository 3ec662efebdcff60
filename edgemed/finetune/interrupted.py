"""Ctrl-C in the middle of a stage: no error, but no result either."""

from __future__ import annotations


class StageInterrupted(KeyboardInterrupt):
    """The stage was stopped after saving; the same command goes on from there."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"Saved at step {step} of {steps}.")
        self.step, self.steps = step, steps
