"""The files of one store, side by side, and their key file.

    cases.db          the cases, encrypted (and cases.db-wal while it is open or after a crash: the newest changes, encrypted as well)
    cases.db.key      the data key, sealed by the passphrase
    cases.db.tries    how often a passphrase was wrong, while it was
    cases.db.lock     which program has the store open

A store is there when cases.db is; it is renamed into place last. Knows no tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgemed.clinic.store.database import RESTORE
from edgemed.clinic.store.keys import KdfCost, SealedKey, derive, new_salt, seal, unseal
from edgemed.core.errors import StoreError
from edgemed.core.files import PART_SUFFIX, found_at, os_errors, save_bytes

MOST_KEY_FILE_BYTES = 1 << 16


@dataclass(frozen=True)
class Layout:
    """The paths that belong to the store at `db`."""

    db: Path

    @property
    def key(self) -> Path:
        return self.db.with_name(self.db.name + ".key")

    @property
    def tries(self) -> Path:
        return self.db.with_name(self.db.name + ".tries")

    @property
    def lock(self) -> Path:
        return self.db.with_name(self.db.name + ".lock")

    @property
    def log(self) -> Path:
        return self.db.with_name(self.db.name + "-wal")

    def make_folder(self) -> None:
        """The folder, for its owner alone where it is new."""
        with os_errors(self.db):
            if not self.db.parent.is_dir():
                self.db.parent.parent.mkdir(parents=True, exist_ok=True)
                self.db.parent.mkdir(mode=0o700, exist_ok=True)

    def require_absent(self) -> None:
        """Refuse to make a store where one is, or where the newest changes of a lost one lie."""
        for path in (self.db, self.log):
            if path.exists() and (path == self.db or path.stat().st_size):  # an empty log, of a program that was killed, says nothing
                raise StoreError(
                    f"Expected no case store at {self.db}, found {path.name}.",
                    f"Open it, or move {self.db.name} and the files beside it ({self.db.name}-wal and so on) to another folder first.",
                )

    def require_present(self) -> None:
        """Refuse to open what is not there."""
        if not self.db.is_file():
            raise StoreError(
                f"Expected a case store at {self.db}, found {found_at(self.db)}.", "Start `edgemed chat` to make one, or restore a backup."
            )

    def remove_parts(self) -> None:
        """What a killed run left half-made. Called under the lock."""
        for path in (self.db, self.key, self.tries):
            for part in path.parent.glob(f".{path.name}.*{PART_SUFFIX}*"):
                part.unlink(missing_ok=True)

    def load_key(self) -> SealedKey:
        """The sealed data key."""
        if not self.key.is_file():
            raise StoreError(f"Expected the key file {self.key.name} beside {self.db.name}, found none.", f"Put it back. {RESTORE}")
        with os_errors(self.key), self.key.open("rb") as f:
            return SealedKey.from_json(f.read(MOST_KEY_FILE_BYTES), self.key.name)

    def save_key(self, box: SealedKey) -> None:
        """Replace the key file in one step."""
        save_bytes(self.key, box.to_json(), mode=0o600)

    def keep_old_key(self) -> None:
        """A key file whose store is gone is put aside, never overwritten: the store may come back."""
        if self.key.exists():
            with os_errors(self.key):
                number = 1
                while (aside := self.key.with_name(f"{self.key.name}.old{number}")).exists():
                    number += 1
                self.key.replace(aside)


@dataclass(frozen=True)
class Opened:
    """What a passphrase gives: the data key, the key for backups with how it is derived, and which passphrase it was by number."""

    data_key: bytes
    backup_key: bytes
    box: SealedKey

    @property
    def generation(self) -> int:
        return int(self.box.facts.get("generation", 0))


def seal_store_key(data_key: bytes, passphrase: str, cost: KdfCost, generation: int) -> Opened:
    """Seal `data_key` by a passphrase."""
    salt = new_salt()
    keys = derive(passphrase, salt, cost)
    box = seal("store", data_key, keys.store, salt, cost, {"generation": generation})
    return Opened(data_key, keys.backup, box)


def unseal_store_key(box: SealedKey, passphrase: str) -> Opened:
    """Open the key file. PassphraseError where the passphrase is another."""
    keys = derive(passphrase, box.salt, box.cost)
    return Opened(unseal(box, keys.store), keys.backup, box)
