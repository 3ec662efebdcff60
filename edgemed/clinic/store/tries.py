"""How often a passphrase was wrong, kept in a small file beside the store so that it survives a restart.

    tries = Tries(path)
    tries.begin(now_s)       # counts this try as failed, before the passphrase is looked at; PassphraseError: "try again in N s"
    tries.succeed()          # how many had failed since the last success

It slows a person at the keyboard, not somebody who copies the files: against those stands Argon2id. Never sleeps. Times are seconds of
the wall clock, because a machine that was off has waited, too; a clock that was set back begins the wait anew, and never a longer one.
"""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgemed.core.errors import PassphraseError
from edgemed.core.files import save_bytes

FREE_TRIES = 3
LONGEST_WAIT_S = 900


@dataclass(frozen=True)
class Tries:
    """The counter in `path`."""

    path: Path

    def begin(self, now_s: float) -> None:
        """Refuse while a wait is on; else count this try as failed until `succeed` says otherwise."""
        failures, last_s = self._load()
        if failures and now_s < last_s:  # the clock was set back: measured from now on
            last_s = now_s
            self._save(failures, last_s)
        left_s = last_s + wait_s(failures) - now_s
        if failures and left_s > 0:
            raise PassphraseError(
                f"The passphrase was wrong {failures} times; try again in {math.ceil(left_s)} s.", "The wait grows with each wrong one."
            )
        self._save(failures + 1, now_s)

    def succeed(self) -> int:
        """Forget the failures; how many there were before this try."""
        failures, _ = self._load()
        self.path.unlink(missing_ok=True)
        return max(0, failures - 1)

    def _save(self, failures: int, last_s: float) -> None:
        save_bytes(self.path, json.dumps({"failures": failures, "last_s": last_s}).encode(), mode=0o600)

    def _load(self) -> tuple[int, float]:
        # Whoever can damage this file can remove it as well, and a doctor is not to be locked out by a bad disk block.
        with suppress(OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raw = json.loads(self.path.read_bytes())
            failures, last_s = int(raw["failures"]), float(raw["last_s"])
            if failures > 0 and math.isfinite(last_s):
                return failures, last_s
        return 0, 0.0


def wait_s(failures: int) -> int:
    """None for the first few, then 2, 4, 8 … seconds, a quarter of an hour at most."""
    return 0 if failures < FREE_TRIES else min(LONGEST_WAIT_S, 2 ** min(failures - FREE_TRIES + 1, 30))
