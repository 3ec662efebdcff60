"""The life of a store: made, opened, locked, unlocked, its passphrase changed, backed up, restored. Settings, because locking needs one.

Everything that needs the passphrase is here. Between, the connection has the data key (in memory that SQLCipher locks and wipes), and two
byte arrays that `lock` overwrites hold it and the key for backups. Python itself may leave copies of keys and of what was typed in memory
that it has freed: it cannot be made to wipe those.

A change of passphrase is two steps: the key file is replaced, then a transaction notes it with the file's number (`generation`). A crash
between leaves a file that is one ahead, which the next opening notes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from edgemed.clinic.records import AuditEntry
from edgemed.clinic.store.access import Access, Change, Means
from edgemed.clinic.store.audit import AuditLog
from edgemed.clinic.store.backup import load_end, open_backup, save_backup
from edgemed.clinic.store.database import Database
from edgemed.clinic.store.filelock import StoreLock
from edgemed.clinic.store.harden import forbid_core_files
from edgemed.clinic.store.keys import SealedKey, check_passphrase, derive, new_key, new_salt
from edgemed.clinic.store.layout import Layout, Opened, seal_store_key, unseal_store_key
from edgemed.clinic.store.rows import storable
from edgemed.clinic.store.schema import migrate
from edgemed.clinic.store.tries import Tries
from edgemed.core.errors import EdgemedError, InputError, ResourceError, StoreError
from edgemed.core.files import atomic_path, found_at

LOCK_AFTER_S = 300
LOCK_SETTING = "lock_after_s"
V = TypeVar("V", bound="Vault")


class Vault:
    """A store that can be opened and locked; CaseStore adds what lies in it. Usable from several threads."""

    def __init__(self, path: Path, actor: str, means: Means) -> None:
        """Use `create`, `open` or `restore`."""
        forbid_core_files()
        self.path = path
        self._access = Access(actor, means)
        self._files = Layout(path)
        self._file_lock = StoreLock(self._files.lock)
        self._backup_key = bytearray()
        self._box: SealedKey | None = None
        self._active_s = means.idle_clock_s()
        self._lock_after_s = LOCK_AFTER_S
        self.audit = AuditLog(self._access)

    # ---------------------------------------------------------------- made and opened

    @classmethod
    def create(cls: type[V], path: Path, passphrase: str, actor: str, means: Means | None = None) -> V:
        """Make an empty store. StoreError where something is there, PassphraseError where the passphrase is too short."""
        check_passphrase(passphrase)
        store = cls(path, actor, means or Means())
        with store._access.lock:
            store._make(passphrase, None)
        return store

    @classmethod
    def open(cls: type[V], path: Path, passphrase: str, actor: str, means: Means | None = None) -> V:
        """Open a store: not there, damaged, newer or in use is a StoreError, a wrong passphrase a PassphraseError."""
        store = cls(path, actor, means or Means())
        store.unlock(passphrase)
        return store

    @classmethod
    def restore(cls: type[V], backup: Path, passphrase: str, path: Path, actor: str, means: Means | None = None) -> V:
        """Make a store from a backup and its passphrase, which becomes the store's. The data key is a new one."""
        store = cls(path, actor, means or Means())
        store._files.require_absent()
        with store._access.lock, open_backup(backup, passphrase) as source:
            store._make(passphrase, source)
        return store

    def _make(self, passphrase: str, source: Database | None) -> None:
        """The store's files, the database last: there is a store when all of it is there."""
        files = self._files
        files.make_folder()
        self._file_lock.acquire()
        try:
            files.require_absent()
            files.remove_parts()
            files.keep_old_key()
            files.tries.unlink(missing_ok=True)
            opened = seal_store_key(new_key(), passphrase, self._access.means.cost, 1)
            with atomic_path(files.db, 0o600) as part:
                self._fill(part, opened, source)
                files.save_key(opened.box)
            self._connect(opened)
        except BaseException:
            self._disconnect()
            raise

    def _fill(self, part: Path, opened: Opened, source: Database | None) -> None:
        """Write a new store's database, empty or from a backup."""
        if source is not None:
            source.copy_into(part, opened.data_key, self.path)
        db = Database.create(part, opened.data_key)
        try:
            change = Change(db, self.actor, self._access.means.now())
            migrate(db, lambda version: _note_migration(change, version) if source is not None else None, created=source is None)
            with db.transaction():
                _save_generation(change, opened.generation)
                if source is None:
                    db.run("INSERT INTO meta (name, value) VALUES ('record_key', ?)", (new_key().hex(),))
                    change.note("store.created", self._access.means.new_id())
                else:
                    change.note("store.restored", detail={"pages_sha256": str(load_end(source.path).box.facts["pages_sha256"])})
            db.rows("PRAGMA wal_checkpoint(TRUNCATE)")  # all of it into the one file that is renamed
        finally:
            db.close()

    def unlock(self, passphrase: str) -> None:
        """Open a locked store. Does nothing where it is open already."""
        with self._access.lock:
            if not self.locked:
                return
            files = self._files
            files.require_present()
            self._file_lock.acquire()
            try:
                files.remove_parts()
                opened, failed = self._try_passphrase(passphrase)
                self._connect(opened)
                self._note_opening(opened, failed)
            except BaseException:
                self._disconnect()
                raise

    def _try_passphrase(self, passphrase: str) -> tuple[Opened, int]:
        """What the passphrase opens, and how many were wrong before."""
        box = self._files.load_key()
        tries = Tries(self._files.tries)
        tries.begin(self._access.means.now().timestamp())
        opened = unseal_store_key(box, passphrase)
        return opened, tries.succeed()

    def _connect(self, opened: Opened) -> None:
        self._access.db = Database.open(self.path, opened.data_key)
        self._backup_key = bytearray(opened.backup_key)
        self._box = opened.box
        self._active_s = self._access.means.idle_clock_s()

    def _note_opening(self, opened: Opened, failed: int) -> None:
        with self._access.reading() as db:
            opening = Change(db, self.actor, self._access.means.now())
            migrate(db, lambda version: _note_migration(opening, version))
        with self._access.changing() as change:
            known = _load_generation(change)
            if opened.generation != known:  # a change of passphrase that was cut short, or an older key file put back
                _save_generation(change, opened.generation)
                what = "passphrase.changed" if opened.generation > known else "passphrase.older"
                change.note(what, detail={"generation": str(opened.generation), "noted": "at the next opening"})
            change.note("store.opened", detail={"failed_tries_before": str(failed)} if failed else {})
            self._lock_after_s = _read_seconds(change.db)

    # ---------------------------------------------------------------- locked

    @property
    def actor(self) -> str:
        """Whose name goes into the audit log."""
        return self._access.actor

    @property
    def locked(self) -> bool:
        """Whether the passphrase is needed."""
        return self._access.db is None

    def lock(self, why: str = "asked") -> None:
        """Close the file, forget the keys, let other programs in. Waits for a change that is under way."""
        with self._access.lock:
            if not self.locked:
                with suppress(EdgemedError), self._access.changing() as change:  # a full disk must not keep it open
                    change.note("store.locked", detail={"why": why})
            self._disconnect()

    close = lock

    def _disconnect(self) -> None:
        db, self._access.db = self._access.db, None
        self._box = None
        for place in range(len(self._backup_key)):
            self._backup_key[place] = 0
        try:
            if db is not None:
                db.close()
        finally:
            self._file_lock.release()

    def __enter__(self: V) -> V:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.lock("closed")

    def touch(self) -> None:
        """Somebody is there: a key, a click. Work of the program's own does not count."""
        self._active_s = self._access.means.idle_clock_s()

    def lock_if_idle(self, now: float | None = None) -> bool:
        """Lock after `lock_after_s` seconds without `touch`; 0 never. True where it locked just now. `now` is of the means' idle clock."""
        idle_s = (self._access.means.idle_clock_s() if now is None else now) - self._active_s
        if self.locked or not 0 < self._lock_after_s <= idle_s:
            return False
        self.lock("idle")
        return True

    # ---------------------------------------------------------------- passphrase and backup

    def change_passphrase(self, old: str, new: str) -> None:
        """Seal the data key by another passphrase. A wrong old one counts as a wrong try and changes nothing."""
        check_passphrase(new)
        with self._access.reading():
            opened, _ = self._try_passphrase(old)
            sealed = seal_store_key(opened.data_key, new, self._access.means.cost, opened.generation + 1)
            self._files.save_key(sealed.box)
            self._backup_key[:] = sealed.backup_key
            self._box = sealed.box
            # Changed it is from here on: where the disk has no room for the note, the next opening notes it, as after a crash.
            with suppress(ResourceError), self._access.changing() as change:
                _save_generation(change, sealed.generation)
                change.note("passphrase.changed", detail={"generation": str(sealed.generation)})

    def backup(self, target: Path, passphrase: str | None = None) -> Path:
        """Write an encrypted backup, opened by the store's passphrase or one of its own; its path (a name is made up in a folder)."""
        if passphrase is not None:
            check_passphrase(passphrase)
        with self._access.reading() as db:
            assert self._box is not None
            if target.is_dir():
                target = target / f"cases-{self._access.means.now():%Y%m%d-%H%M%S}.edgemed-backup"
            _require_new_file(target)
            salt, cost, key = self._box.salt, self._box.cost, bytes(self._backup_key)
            if passphrase is not None:
                salt, cost = new_salt(), self._access.means.cost
                key = derive(passphrase, salt, cost).backup
            pages_sha256 = save_backup(db, target, key, salt, cost)
            with self._access.changing() as change:
                change.note("store.backed_up", detail={"pages_sha256": pages_sha256})
        return target

    # ---------------------------------------------------------------- settings

    def get_setting(self, name: str, default: str = "") -> str:
        """A setting of the user, such as the language."""
        with self._access.reading() as db:
            row = db.row("SELECT value FROM setting WHERE name = ?", (name,))
        return default if row is None else str(row[0])

    def set_setting(self, name: str, value: str) -> None:
        """Keep a setting."""
        name, value = storable(name), storable(value)
        with self._access.reading() as db:
            if db.row("SELECT value FROM setting WHERE name = ?", (name,)) == (value,):
                return
            with self._access.changing() as change:
                db.run("INSERT OR REPLACE INTO setting (name, value) VALUES (?, ?)", (name, value))
                change.note("setting.changed", name, kind="setting")
            self._lock_after_s = _read_seconds(db)


def _require_new_file(target: Path) -> None:
    if os.path.lexists(target):
        raise StoreError(f"Expected no file at {target}, found {found_at(target)}.", "Choose another name, or a folder.")
    if not target.parent.is_dir():  # never made: a stick that is not plugged in must not become a folder of the laptop
        raise InputError(
            f"Expected a folder at {target.parent}, found {found_at(target.parent)}.", "Plug the stick in, or make the folder."
        )


def _note_migration(change: Change, version: int) -> AuditEntry:
    return change.note("store.migrated", detail={"version": str(version)})


def _load_generation(change: Change) -> int:
    row = change.db.row("SELECT value FROM meta WHERE name = 'key_generation'")
    return 0 if row is None else int(row[0])


def _save_generation(change: Change, generation: int) -> None:
    change.db.run("INSERT OR REPLACE INTO meta (name, value) VALUES ('key_generation', ?)", (str(generation),))


def _read_seconds(db: Database) -> int:
    row = db.row("SELECT value FROM setting WHERE name = ?", (LOCK_SETTING,))
    with suppress(ValueError, TypeError):
        return max(0, int(row[0])) if row is not None else LOCK_AFTER_S
    return LOCK_AFTER_S
