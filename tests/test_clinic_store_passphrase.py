"""Passphrases: wrong, tried too often, changed, cut short while being changed; one program at a time; files that are damaged or newer."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from clinic_store import AMINA, COST, FACTS, PASSPHRASE, Clock, make_store, open_store, tamper

from edgemed.clinic.store import CaseStore, KdfCost, Means, schema
from edgemed.clinic.store import keys as keys_module
from edgemed.clinic.store.database import Database
from edgemed.clinic.store.keys import SealedKey, derive, new_key, new_salt, seal, unseal
from edgemed.clinic.store.layout import Layout
from edgemed.clinic.store.tries import LONGEST_WAIT_S, Tries, wait_s
from edgemed.core.errors import PassphraseError, ResourceError, StoreError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed store with a case."""
    path = tmp_path / "cases" / "cases.db"
    with make_store(path) as store:
        store.create_case("wrist", AMINA)
    return path


# ---------------------------------------------------------------- made and opened


def test_only_its_owner_may_read_it(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        store = make_store(tmp_path / "new" / "cases.db")
        store.create_case("x")
        store.backup(tmp_path / "backup")
        with pytest.raises(PassphraseError):
            store.change_passphrase("not the passphrase", "another passphrase")
    finally:
        os.umask(old)
    found = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [tmp_path / "new", tmp_path / "backup", *(tmp_path / "new").iterdir()]}
    names = ("cases.db", "cases.db-wal", "cases.db.key", "cases.db.lock", "cases.db.tries", "backup")
    assert found == {"new": 0o700} | dict.fromkeys(names, 0o600)  # and no index of the log beside it
    store.close()


def test_what_cannot_be_made(path: Path) -> None:
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    with pytest.raises(StoreError, match="found cases.db"):
        make_store(path)
    for short in ("", "1234567", "é" * 7):
        with pytest.raises(PassphraseError, match="8 to 1024 characters, found"):
            CaseStore.create(path.parent / "other.db", short, "a")
    assert {p.name: p.read_bytes() for p in path.parent.iterdir()} == before


def test_stores_of_like_names_share_nothing(path: Path) -> None:
    names = {p.name for p in path.parent.iterdir()}
    before = Layout(path).key.read_bytes()
    with make_store(path.with_name("cases.other")), make_store(path.with_name("cases")), open_store(path) as store:
        assert store.list_cases("wrist")
    assert Layout(path).key.read_bytes() == before and names <= {p.name for p in path.parent.iterdir()}
    with pytest.raises(StoreError, match="found cases.db.key"):
        make_store(Layout(path).key)


def test_a_lost_stores_log_and_key_are_never_overwritten(path: Path) -> None:
    key = Layout(path).key.read_bytes()
    path.rename(path.with_name("moved"))
    Layout(path).log.write_bytes(b"newest changes")
    with pytest.raises(StoreError, match="found cases.db-wal"):
        make_store(path)
    Layout(path).log.unlink()
    make_store(path).close()
    assert path.with_name("cases.db.key.old1").read_bytes() == key


def test_a_run_that_was_killed_while_making_a_store_is_tidied(path: Path) -> None:
    left = [path.with_name(f".cases.{name}") for name in ("db.x1.part", "db.x1.part-wal", "db.key.x2.part")]
    for part in left:
        part.write_bytes(b"x")
    open_store(path).close()
    assert not [part for part in left if part.exists()]


def test_what_is_not_there(tmp_path: Path, path: Path) -> None:
    with pytest.raises(StoreError, match="found none") as told:
        open_store(tmp_path / "no" / "cases.db")
    assert "edgemed chat" in told.value.hint and not (tmp_path / "no").exists()
    Layout(path).key.unlink()
    with pytest.raises(StoreError, match="key file cases.db.key"):
        open_store(path)


# ---------------------------------------------------------------- wrong passphrases


def test_a_wrong_passphrase_and_a_changed_key_file_say_the_same(path: Path) -> None:
    said = []
    clock = Clock()
    for passphrase, change in (("not the passphrase", {}), (PASSPHRASE, {"facts": {"generation": 7}}), (PASSPHRASE, {"sealed": bytes(48)})):
        layout = Layout(path)
        whole = layout.load_key()
        layout.save_key(dataclasses.replace(whole, **change))
        with pytest.raises(PassphraseError) as told:
            open_store(path, clock, passphrase)
        said.append((told.value.message, told.value.hint))
        layout.save_key(whole)
    assert set(said) == {("The passphrase is wrong.", said[0][1])}
    clock.pass_s(60)
    open_store(path, clock).close()


def test_every_try_costs_the_same_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs: list[KdfCost] = []

    def counted(passphrase: str, salt: bytes, cost: KdfCost) -> keys_module.PassphraseKeys:
        costs.append(cost)
        return derive(passphrase, salt, cost)

    monkeypatch.setattr("edgemed.clinic.store.layout.derive", counted)
    for passphrase in ("x", "not the passphrase", PASSPHRASE):
        try:
            open_store(path, passphrase=passphrase).close()
        except PassphraseError:
            continue
    assert costs == [COST] * 3


def test_the_same_letters_typed_on_another_keyboard(tmp_path: Path) -> None:
    path = tmp_path / "cases.db"
    CaseStore.create(path, "mot de passe élève", "a", Means(cost=COST)).close()
    open_store(path, passphrase="mot de passe e\u0301le\u0300ve").close()
    with pytest.raises(PassphraseError):
        open_store(path, passphrase="mot de passe eleve")


def test_the_wait_grows_and_survives_a_restart(path: Path) -> None:
    clock = Clock()
    for _ in range(3):
        with pytest.raises(PassphraseError, match="^The passphrase is wrong"):
            open_store(path, clock, "not the passphrase")
    for failures, wait in ((3, 2), (4, 4), (5, 8)):
        for passphrase in (PASSPHRASE, "not the passphrase"):  # while it waits, the right one is refused as well
            with pytest.raises(PassphraseError, match=rf"wrong {failures} times; try again in {wait} s\.$"):
                open_store(path, clock, passphrase)
        clock.pass_s(wait)
        with pytest.raises(PassphraseError, match="^The passphrase is wrong"):
            open_store(path, clock, "not the passphrase")
    clock.pass_s(16)
    with open_store(path, clock) as store:
        assert store.audit.entries()[-1].detail == {"failed_tries_before": "6"}
    with pytest.raises(PassphraseError, match="^The passphrase is wrong"):  # forgotten after a success
        open_store(path, clock, "not the passphrase")


def test_the_wait_has_an_end_also_when_the_clock_is_wrong(tmp_path: Path) -> None:
    assert [wait_s(n) for n in (0, 2, 3, 10, 1000)] == [0, 0, 2, 256, LONGEST_WAIT_S]
    tries = Tries(tmp_path / "tries")
    tries.path.write_text('{"failures": 5, "last_s": 5000000000}')
    with pytest.raises(PassphraseError, match="in 8 s"):
        tries.begin(100)  # the clock was set back by decades
    with pytest.raises(PassphraseError, match="in 1 s"):
        tries.begin(107.5)
    tries.begin(108)
    assert tries.succeed() == 5 and not tries.path.exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"failures": "x", "last_s": 1}', b'{"failures": 9, "last_s": NaN}', b"9" * 9999]
)
def test_a_damaged_counter_locks_nobody_out(tmp_path: Path, content: bytes) -> None:
    tries = Tries(tmp_path / "tries")
    tries.path.write_bytes(content)
    tries.begin(100)
    assert tries.succeed() == 0


def test_a_try_is_counted_before_it_is_looked_at(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgemed.clinic.store.vault.unseal_store_key", killed)
    with pytest.raises(KeyboardInterrupt):
        open_store(path)
    assert json.loads(Layout(path).tries.read_bytes())["failures"] == 1
    monkeypatch.undo()
    open_store(path).close()


# ---------------------------------------------------------------- changed passphrases


def test_change_of_passphrase(path: Path) -> None:
    with open_store(path) as store:
        with pytest.raises(PassphraseError, match="8 to 1024"):
            store.change_passphrase(PASSPHRASE, "short")
        with pytest.raises(PassphraseError, match="wrong"):
            store.change_passphrase("not the passphrase", "another passphrase")
        store.change_passphrase(PASSPHRASE, "another passphrase")
        assert store.list_cases("wrist")
    with pytest.raises(PassphraseError):
        open_store(path)
    with open_store(path, passphrase="another passphrase") as store:
        assert "passphrase.changed" in [entry.action for entry in store.audit.entries()] and store.audit.verify()


def test_a_change_of_passphrase_cut_between_its_two_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(path)
    with monkeypatch.context() as patched:
        patched.setattr("edgemed.clinic.store.vault._save_generation", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            store.change_passphrase(PASSPHRASE, "another passphrase")
    store.close()
    with open_store(path, passphrase="another passphrase") as again:
        noted = [entry for entry in again.audit.entries() if entry.action == "passphrase.changed"]
        assert [entry.detail for entry in noted] == [{"generation": "2", "noted": "at the next opening"}]
    with open_store(path, passphrase="another passphrase") as again:
        assert sum(entry.action == "passphrase.changed" for entry in again.audit.entries()) == 1


def test_a_change_of_passphrase_that_the_disk_has_no_room_to_note_is_a_change(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(path)
    with monkeypatch.context() as patched:
        full = ResourceError("The disk is full.", "Free some space.")
        patched.setattr("edgemed.clinic.store.vault._save_generation", lambda *_: (_ for _ in ()).throw(full))
        store.change_passphrase(PASSPHRASE, "another passphrase")
    store.close()
    with pytest.raises(PassphraseError):
        open_store(path)
    with open_store(path, passphrase="another passphrase") as again:
        noted = [entry.detail for entry in again.audit.entries() if entry.action == "passphrase.changed"]
        assert noted == [{"generation": "2", "noted": "at the next opening"}] and again.audit.verify()


def test_an_old_key_file_put_back_is_noted(path: Path) -> None:
    old = Layout(path).key.read_bytes()
    with open_store(path) as store:
        store.change_passphrase(PASSPHRASE, "another passphrase")
    Layout(path).key.write_bytes(old)
    with open_store(path) as store:
        assert "passphrase.older" in [entry.action for entry in store.audit.entries()]


# ---------------------------------------------------------------- sealed keys


def test_sealed_keys() -> None:
    salt, key = new_salt(), new_key()
    keys = derive("a passphrase", salt, COST)
    box = seal("store", key, keys.store, salt, COST, {"generation": 3})
    again = SealedKey.from_json(box.to_json(), "x")
    assert again == box and unseal(again, keys.store) == key and keys.store != keys.backup
    assert key not in box.to_json() and key.hex().encode() not in box.to_json()
    for other in (
        dataclasses.replace(box, purpose="backup"),
        dataclasses.replace(box, facts={"generation": 4}),
        dataclasses.replace(box, cost=KdfCost(64, 2, 1)),
        dataclasses.replace(box, salt=new_salt()),
    ):
        with pytest.raises(PassphraseError):
            unseal(other, keys.store)
    with pytest.raises(PassphraseError):
        unseal(box, keys.backup)


def test_the_default_cost_is_the_rfcs_second_recommendation() -> None:
    assert KdfCost() == KdfCost(memory_kib=64 * 1024, passes=3, lanes=4) == Means().cost


BROKEN = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff\xfe",
    b"[" * 5000,
    {"format": "x"},
    {"purpose": "x"},
    {"nonce": "00"},
    {"sealed": "zz"},
    {"sealed": "00" * 47},
    {"facts": 3},
    {"kdf": {"name": "argon2id", "salt": "00" * 16, "memory_kib": 1 << 31, "passes": 3, "lanes": 4}},
    {"kdf": {"name": "argon2id", "salt": "00" * 16, "memory_kib": 64, "passes": 1 << 31, "lanes": 1}},
    {"kdf": {"name": "argon2id", "salt": "00" * 16, "memory_kib": 8, "passes": 1, "lanes": 4}},
    {"kdf": {"name": "argon2id", "salt": "00" * 3, "memory_kib": 64, "passes": 1, "lanes": 1}},
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: str(b)[:40])
def test_a_damaged_key_file(path: Path, broken: bytes | dict[str, object]) -> None:
    key = Layout(path).key
    key.write_bytes(broken if isinstance(broken, bytes) else json.dumps(json.loads(key.read_bytes()) | broken).encode())
    with pytest.raises(StoreError, match="Expected a sealed key in cases.db.key") as told:
        open_store(path)
    assert "restore" in told.value.hint and not isinstance(told.value, PassphraseError)


def test_a_newer_key_file(path: Path) -> None:
    key = Layout(path).key
    key.write_text(json.dumps(json.loads(key.read_bytes()) | {"version": 9}))
    with pytest.raises(StoreError, match="Expected version 1 in cases.db.key, found 9"):
        open_store(path)


# ---------------------------------------------------------------- two programs

HOLDER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests")
from clinic_store import open_store
store = open_store(Path(sys.argv[1]))
print("open", flush=True)
for line in sys.stdin:
    store.lock() if line == "lock\\n" else store.unlock("correct horse battery")
    print(line.strip(), flush=True)
"""


def test_two_programs_on_one_store(path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as holder:
        assert holder.stdout is not None and holder.stdin is not None
        holder.stdout.readline()
        for _ in range(5):  # refused before the passphrase is looked at, so that nothing is counted
            with pytest.raises(StoreError, match="in use by another program"):
                open_store(path, passphrase="not the passphrase")
        assert not Layout(path).tries.exists()
        print("lock", file=holder.stdin, flush=True)
        holder.stdout.readline()
        with open_store(path) as store:  # while one is locked, another may
            assert store.list_cases("wrist")
        print("unlock", file=holder.stdin, flush=True)
        holder.stdout.readline()
        with pytest.raises(StoreError, match="in use by another program"):
            open_store(path)
        holder.kill()  # the lock goes with the process
        holder.wait()
    open_store(path).close()


def test_two_stores_in_one_program(path: Path) -> None:
    with open_store(path) as store:
        with pytest.raises(StoreError, match="in use by another program"):
            open_store(path)
        store.lock()
        with open_store(path):
            with pytest.raises(StoreError, match="in use by another program"):
                store.unlock(PASSPHRASE)
            assert store.locked
        store.unlock(PASSPHRASE)
        store.unlock("does nothing where it is open")


# ---------------------------------------------------------------- versions and damage


def test_migrations_run_once_each_in_order(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def second(db: Database) -> None:
        db.run("ALTER TABLE cases ADD COLUMN room TEXT NOT NULL DEFAULT ''")

    def third(db: Database) -> None:
        db.run("UPDATE cases SET room = 'x-ray'")

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, second, third))
    for _ in range(2):
        with open_store(path) as store, store._access.reading() as db:
            assert db.rows("SELECT room FROM cases") == [("x-ray",)] and db.rows("PRAGMA user_version") == [(3,)]
            assert [e.detail for e in store.audit.entries() if e.action == "store.migrated"] == [{"version": "2"}, {"version": "3"}]
            assert store.list_cases("wrist") and store.audit.verify()
    monkeypatch.undo()
    with pytest.raises(StoreError, match="version 1 or older, found version 3: a newer edgemed wrote it"):
        open_store(path)


def test_a_backup_of_an_older_version_is_migrated(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_store(path) as store:
        store.backup(tmp_path / "old")
    with monkeypatch.context() as patched:
        patched.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, lambda db: db.run("CREATE TABLE room (x)")))
        with CaseStore.restore(tmp_path / "old", PASSPHRASE, tmp_path / "r" / "cases.db", "a", Clock().means()) as store:
            assert [e.action for e in store.audit.entries()][-2:] == ["store.migrated", "store.restored"] and store.audit.verify()
            store.backup(tmp_path / "new")
    with pytest.raises(StoreError, match="found version 2: a newer edgemed"):
        CaseStore.restore(tmp_path / "new", PASSPHRASE, tmp_path / "r2" / "cases.db", "a", Clock().means())
    assert not (tmp_path / "r2" / "cases.db").exists()


def test_a_migration_that_fails_leaves_the_version_before(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(db: Database) -> None:
        db.run("ALTER TABLE cases ADD COLUMN room TEXT")
        db.run("UPDATE nonsense SET x = 1")

    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS, broken))
    with pytest.raises(StoreError):
        open_store(path)
    monkeypatch.undo()
    with open_store(path) as store, store._access.reading() as db:
        assert db.rows("PRAGMA user_version") == [(1,)] and "room" not in [row[1] for row in db.rows("PRAGMA table_info(cases)")]


def test_a_damaged_database(path: Path) -> None:
    whole = path.read_bytes()
    flipped = whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:]  # never the byte it was, as a zero would be once in 256
    for damaged in (b"", b"x" * len(whole), whole[:100], flipped):
        path.write_bytes(damaged)
        with pytest.raises(StoreError, match=r"damaged file|file without its tables") as told:
            open_store(path)
        assert "restore" in told.value.hint
    path.write_bytes(whole)
    with open_store(path) as store:
        image = store.add_image(store.list_cases()[0].id, "x", bytes(500_000), FACTS)
    middle = path.read_bytes()
    path.write_bytes(middle[:300_000] + bytes([middle[300_000] ^ 1]) + middle[300_001:])
    with open_store(path) as store:  # a page in the middle: the rest can still be read
        assert store.list_cases("wrist")
        with pytest.raises(StoreError, match="damaged file"):
            store.read_image(image.id)
        with pytest.raises(StoreError, match="damaged file"):
            store.audit.verify()
        with pytest.raises(StoreError, match="damaged file"):
            store.backup(path.with_name("backup"))
        assert not path.with_name("backup").exists()
        assert store.add_message(store.list_cases()[0].id, "user", "and all else goes on")


def test_no_page_is_damaged_unnoticed(path: Path) -> None:
    with open_store(path) as store:
        for n in range(40):  # so that tables and their indexes are pages of their own
            store.add_message(store.list_cases()[0].id, "user", f"{n} " + "x" * 500)
    whole = path.read_bytes()
    quiet = []
    for start in range(4096, len(whole), 4096):
        at = start + 100
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            with open_store(path) as store:
                store.audit.verify()
        except StoreError:
            continue
        quiet.append(start)
    assert len(whole) > 20 * 4096 and not quiet


def test_a_damaged_record(path: Path) -> None:
    with open_store(path) as store:
        case = store.list_cases()[0]
        store.add_message(case.id, "user", "x")
    tamper(path, lambda db: db.run("UPDATE message SET images = '{', created = 'yesterday'"))
    with open_store(path) as store, pytest.raises(StoreError, match="whole message in the case store, found a damaged one"):
        store.list_messages(case.id)
