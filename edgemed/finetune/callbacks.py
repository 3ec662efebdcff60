"""What happens around a step: the clock, rounding errors, Ctrl-C, and telling how far training has come."""

from __future__ import annotations

import random
import signal
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback

from edgemed.finetune.progress import Progress, Report
from edgemed.finetune.rounding import LoraRounding

# A terminal that went away; Windows has no such signal.
HANG_UP = getattr(signal, "SIGHUP", None)


class Clock(TrainerCallback):
    """Seconds of training as each step ends, those before an interruption included; the first process's, since all must agree on rates
    and on the last step. `shared`: whether anything depends on it, so that all are told."""

    def __init__(self, shared: bool) -> None:
        self.begin, self.shared, self.spent_s = time.monotonic(), shared, 0.0

    def restore(self, spent_s: float) -> None:
        self.begin, self.spent_s = time.monotonic() - spent_s, spent_s

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.spent_s = time.monotonic() - self.begin
        if self.shared and _several_processes():
            told = torch.tensor(self.spent_s, dtype=torch.float64, device=args.device)
            torch.distributed.broadcast(told, src=0)
            self.spent_s = float(told)


class Deadline(TrainerCallback):
    """Ends training after so many minutes."""

    def __init__(self, clock: Clock, minutes: float) -> None:
        self.clock, self.minutes = clock, minutes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = control.should_training_stop or self.clock.spent_s > 60 * self.minutes


class RoundingCallback(TrainerCallback):
    """Every REFRESH steps draws anew whether the LLM computes with 4-bit rounding errors, and brings them up to date.

    The draw depends on the step alone, and checkpoints are taken at multiples of REFRESH, so that a resumed run sees the same errors.
    """

    # Each time searches all scales anew.
    REFRESH = 16

    def __init__(self, model: Any, share: float, seed: int) -> None:
        self.rounding, self.share, self.seed = LoraRounding(model), share, seed

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.REFRESH == 0:
            self.rounding.apply(random.Random(f"{self.seed}-{state.global_step}").random() < self.share)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rounding.apply(False)


class Stop(TrainerCallback):
    """Ctrl-C (or SIGTERM, or SIGHUP) lets the step end, saves and stops; a second one interrupts at once. Used as a context manager.

    With several processes all stop at the same step, whichever was told. `every`: only at multiples of so many steps.
    """

    def __init__(self, every: int = 1) -> None:
        self.every, self.asked, self.stopped = every, False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if HANG_UP is not None and signal.getsignal(HANG_UP) is not signal.SIG_IGN:  # under nohup training goes on
                numbers.append(HANG_UP)
            self._before = {number: signal.signal(number, self._handle) for number in numbers}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number != HANG_UP:  # which the shell and the system tell of, each once
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps and _any_process(self.asked, args.device):
            self.stopped = control.should_save = control.should_training_stop = True


def _several_processes() -> bool:
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def _any_process(value: bool, device: torch.device) -> bool:
    if not _several_processes():
        return value
    flag = torch.tensor(int(value), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
    return bool(flag.item())


class Reporter(TrainerCallback):
    """Hands a Progress to `report` after every step."""

    WINDOW_STEPS = 20

    def __init__(self, report: Report, rows_per_step: int, losses: deque[float]) -> None:
        """`losses` holds the last step's loss, put there by the trainer."""
        self.report, self.rows_per_step, self.losses = report, rows_per_step, losses
        self.times: deque[float] = deque(maxlen=self.WINDOW_STEPS + 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.monotonic())
        step_s = (self.times[-1] - self.times[0]) / (len(self.times) - 1)
        left = state.max_steps - state.global_step
        loss = self.losses[-1] if self.losses else float("nan")
        rate = self.rows_per_step / max(step_s, 1e-9)
        with suppress(OSError):  # a terminal that went away takes no training with it
            self.report(Progress(state.global_step, state.max_steps, loss, rate, left * step_s, peak_memory_bytes()))


def peak_memory_bytes() -> int:
    """The highest use so far: of the GPU's memory by torch, else resident memory of this process (0 where the system does not tell)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_reserved())
    if sys.platform == "win32":
        return 0
    import resource  # posix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
