"""SIGTERM (a machine that shuts down, a person's `kill`) and SIGHUP (a terminal that went away) end a command as Ctrl-C does.

They become an exception, so that on the way out what was being made is removed and what can be gone on with is kept. The terminal
program and training put handlers of their own in their place while they run.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

# A signal that comes so soon after the first is the same ending, told twice: by the shell and by the system.
_SAME_S = 5.0


class Ended(SystemExit):
    """A signal ended the command; its exit code is the one that a shell gives for it."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name, self.exit_code = signal.Signals(number).name, 128 + number


def heed_signals() -> None:
    """Raise Ended in the main thread when such a signal comes. One that is ignored (nohup) stays so."""
    begun: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        if begun and time.monotonic() - begun[-1] < _SAME_S:
            return
        begun.append(time.monotonic())
        raise Ended(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)
