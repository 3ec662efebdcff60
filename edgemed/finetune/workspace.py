"""A stage's folder while it is being trained: one process at a time, checkpoints that are whole or not there, resume or refuse.

    with Workspace(out) as work:
        work.check(fingerprint)         # RecipeError where the folder holds another run
        newest = work.newest()          # a checkpoint to go on from, or None

OUT/trainer holds fingerprint.json and checkpoint-STEP folders; a checkpoint is written in OUT/trainer/.saving, synced and renamed.
Knows neither torch nor what is in a checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgemed.core.errors import RecipeError, ResourceError
from edgemed.core.filelock import FileLock
from edgemed.core.files import os_errors, save_text, sync_dir, sync_tree

LOCK_NAME = ".lock"
FINGERPRINT_NAME = "fingerprint.json"
RUN_NAME = "run.json"
PREFIX = "checkpoint-"
# An exported checkpoint and a checkpoint to resume from need room beside what is estimated: tokenizer, states, the file system itself.
SPARE_BYTES = 16 << 20


class Workspace:
    """The folder `out`. Only the first of several processes (`main`) locks and writes."""

    def __init__(self, out: Path, main: bool = True) -> None:
        self.out, self.main = out, main
        self.trainer = out / "trainer"
        self.staging = self.trainer / ".saving"
        busy = ResourceError(
            f"Expected {out} for this run alone, found another one training in it.", "Wait for it, or name another output."
        )
        self._lock = FileLock(out / LOCK_NAME, busy)

    def __enter__(self) -> Workspace:
        if self.main:
            with os_errors(self.out):
                self.trainer.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            shutil.rmtree(self.staging, ignore_errors=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.release()

    def check(self, fingerprint: dict[str, Any]) -> bool:
        """Whether the folder holds this run's finished result. Raises RecipeError where it holds another run's result or checkpoints."""
        finished = _load(self.out / RUN_NAME).get("fingerprint")
        found = finished or (_load(self.trainer / FINGERPRINT_NAME) if self.newest() else None)
        changed = [] if found is None else differences(found, fingerprint)
        if changed:
            what = "result" if finished else "checkpoints"
            raise RecipeError(
                f"Expected {self.out} to be new or to hold this recipe's run on this data, found {what} of a run that differs in"
                f" {', '.join(changed[:8])}.",
                "Name another output, or remove the folder; a run goes on only with the recipe and the data it began with.",
            )
        if self.main and not finished:
            save_text(self.trainer / FINGERPRINT_NAME, json.dumps(fingerprint, indent=1) + "\n")
        return finished is not None

    def newest(self) -> Path | None:
        """The checkpoint of the highest step."""
        found = [p for p in self.trainer.glob(f"{PREFIX}*") if p.is_dir() and p.name.removeprefix(PREFIX).isdigit()]
        return max(found, key=lambda p: int(p.name.removeprefix(PREFIX)), default=None)

    def commit(self, name: str) -> None:
        """Make the staged checkpoint `name` the newest and the only one."""
        target = self.trainer / name
        with os_errors(target):
            sync_tree(self.staging / name)
            shutil.rmtree(target, ignore_errors=True)
            (self.staging / name).replace(target)
            sync_dir(self.trainer)
            for old in self.trainer.glob(f"{PREFIX}*"):
                if old != target:
                    shutil.rmtree(old, ignore_errors=True)

    def clear(self) -> None:
        """Remove the checkpoints of a run that has ended."""
        if self.main:
            shutil.rmtree(self.trainer, ignore_errors=True)

    def discard(self) -> None:
        """Remove what is staged."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def require_space(self, size_bytes: int, what: str) -> None:
        """Raises ResourceError where the disk has no room for `what`."""
        with os_errors(self.out):
            free = shutil.disk_usage(self.out).free
        if free < size_bytes + SPARE_BYTES:
            raise ResourceError(
                f"Expected {(size_bytes + SPARE_BYTES) / 1e9:.2f} GB of free disk for {what} in {self.out}, found {free / 1e9:.2f} GB.",
                "Free some space and run the same command again: it goes on from the last checkpoint.",
            )


@contextmanager
def writing(path: Path, foreign: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """os_errors, also for libraries that wrap a full disk in an error of their own (`foreign`)."""
    try:
        with os_errors(path):
            yield
    except foreign as error:
        if "No space left" in str(error) or "os error 28" in str(error) or shutil.disk_usage(path.parent).free < SPARE_BYTES:
            raise ResourceError(
                f"The disk is full while writing {path}.",
                "Free some space and run the same command again: it goes on from the last checkpoint.",
            ) from error
        raise


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two JSON objects differ."""
    out = []
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key), b.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            out += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            out.append(prefix + key)
    return out


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with os_errors(path):
        raw = path.read_bytes()
    try:
        data = json.loads(raw)
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict):
        raise RecipeError(f"Expected JSON in {path}, found something else.", "Remove the folder and train again.")
    return data
