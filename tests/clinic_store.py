"""A case store for tests: cheap to open, its clocks turned by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

from edgemed.clinic.records import ImageFacts, PatientIdentity
from edgemed.clinic.store import CaseStore, KdfCost, Means
from edgemed.clinic.store.access import new_id
from edgemed.clinic.store.database import Database
from edgemed.clinic.store.layout import Layout, unseal_store_key

PASSPHRASE = "correct horse battery"
COST = KdfCost(64, 1, 1)
FACTS = ImageFacts("plain", 4, 3)
AMINA = PatientIdentity("Touré^Amina", "P-4711", "1990-02-03", "F", "ACC-99", "1.2.3.4")


@dataclass
class Clock:
    """Wall clock and idle clock, moved by `pass_s`."""

    wall: datetime = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
    idle_s: float = 1000.0

    def pass_s(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.idle_s += seconds

    def means(self) -> Means:
        def now() -> datetime:
            self.wall += timedelta(microseconds=1)  # so that what comes later is later
            return self.wall

        return Means(now=now, idle_clock_s=lambda: self.idle_s, new_id=new_id, cost=COST)


def make_store(path: Path, clock: Clock | None = None) -> CaseStore:
    """A new store."""
    return CaseStore.create(path, PASSPHRASE, "Dr. Test", (clock or Clock()).means())


def open_store(path: Path, clock: Clock | None = None, passphrase: str = PASSPHRASE) -> CaseStore:
    """The store again."""
    return CaseStore.open(path, passphrase, "Dr. Test", (clock or Clock()).means())


def tamper(path: Path, change: Callable[[Database], object], passphrase: str = PASSPHRASE) -> None:
    """Change a closed store behind its back, as somebody with the passphrase and another program can."""
    db = Database.open(path, unseal_store_key(Layout(path).load_key(), passphrase).data_key)
    change(db)
    db.close()
