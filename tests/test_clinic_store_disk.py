"""What lies on disk: nothing in clear, a whole backup, and after a full disk, SIGKILL or a power cut all that was acknowledged."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clinic_store import COST, FACTS, PASSPHRASE, Clock, make_store, open_store
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from test_pipeline_bad_input import mount

from bench.store_crash import Expected, run
from bench.store_crash import open_store as open_bench
from edgemed.clinic.records import ImageFacts, PatientIdentity, Report
from edgemed.clinic.store import CaseStore, KdfCost, Means, harden
from edgemed.clinic.store import backup as backup_module
from edgemed.clinic.store import database as database_module
from edgemed.clinic.store.layout import Layout, unseal_store_key
from edgemed.core.errors import InputError, PassphraseError, ResourceError, StoreError

ROOT = Path(__file__).resolve().parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="SIGKILL, core files and mounts")

# ---------------------------------------------------------------- nothing in clear

PLANTED = {
    "label": "PLANTEDLABEL wrist",
    "name": "PLANTEDNAME^Zoë",
    "patient_id": "PLANTEDID-0815",
    "birth_date": "PLANTEDDATE-1931-01-02",
    "accession": "PLANTEDACC",
    "study_uid": "1.2.999.777.555.PLANTED",
    "question": "PLANTEDQUESTION is it broken?",
    "answer": "PLANTEDANSWER it is.",
    "finding": "PLANTEDFINDING",
    "signer": "Dr. PLANTEDSIGNER",
    "file": "PLANTEDFILE.dcm",
    "description": "PLANTEDDESCRIPTION",
    "pixels": "PLANTEDPIXELS" * 4000,
    "passphrase": PASSPHRASE,
}


def spellings(text: str) -> set[bytes]:
    plain = text[:40].encode()
    return {plain, text[:40].encode("utf-16-le"), text[:40].encode("utf-16-be"), plain.hex().encode(), base64.b64encode(plain[:30])}


def found_in(folder: Path) -> set[str]:
    """Which planted words lie in any byte, or any name, under `folder`."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    assert files
    everything = b"\n".join([p.read_bytes() + str(p).encode() for p in files])
    return {what for what, text in PLANTED.items() if any(spelled in everything for spelled in spellings(text))}


def plant(store: CaseStore) -> str:
    """A case in which every text is one to look for; its id."""
    p = PLANTED
    case = store.create_case(p["label"], PatientIdentity(p["name"], p["patient_id"], p["birth_date"], "F", p["accession"], p["study_uid"]))
    store.add_image(case.id, p["file"], p["pixels"].encode(), ImageFacts("dicom", 1, 1, description=p["description"]))
    store.add_message(case.id, "user", p["question"])
    store.add_message(case.id, "assistant", p["answer"])
    store.save_report(Report(case.id, findings=p["finding"]))
    store.sign_report(case.id, p["signer"])
    return case.id


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of temporary files of our own, seen by Python and SQLite."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    for name in ("TMPDIR", "SQLITE_TMPDIR", "TEMP", "TMP"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder


def test_nothing_in_clear_at_any_time(tmp_path: Path, temporary: Path) -> None:
    control = tmp_path / "control"
    control.mkdir()
    (control / "clear").write_text("\n".join(PLANTED.values()), encoding="utf-8")
    assert found_in(control) == set(PLANTED)
    (control / "clear").unlink()

    store = make_store(tmp_path / "cases" / "cases.db")
    case_id = plant(store)
    assert (tmp_path / "cases" / "cases.db-wal").stat().st_size > 100_000  # open: all of it is in the log
    assert found_in(tmp_path) == set()
    assert store.list_cases("PLANTEDNAME plantedquestion") and store.list_messages(case_id)
    with store._access.reading() as db:  # a sort that needs a temporary table
        db.rows("SELECT x.text FROM message AS x, message AS y, audit, audit AS b ORDER BY x.text || y.text")
    store.backup(tmp_path / "stick")
    store.backup(tmp_path / "own", "PLANTED own passphrase")
    store.change_passphrase(PASSPHRASE, PASSPHRASE + " 2")
    assert found_in(tmp_path) == set()
    store.lock()
    assert found_in(tmp_path) == set() and not (tmp_path / "cases" / "cases.db-wal").exists()
    with pytest.raises(PassphraseError):
        store.unlock("not the passphrase")
    store.unlock(PASSPHRASE + " 2")
    restored = CaseStore.restore(tmp_path / "stick", PASSPHRASE, tmp_path / "r" / "cases.db", "a", Clock().means())
    assert restored.list_cases("plantedname")
    store.delete_case(case_id)
    store.close()
    restored.close()
    assert found_in(tmp_path) == set() and list(temporary.iterdir()) == []


SETTINGS = {
    "journal_mode": "wal",
    "synchronous": 2,
    "locking_mode": "exclusive",
    "wal_autocheckpoint": 0,
    "secure_delete": 1,
    "foreign_keys": 1,
    "temp_store": 2,
    "trusted_schema": 0,
    "auto_vacuum": 2,
    "cipher_page_size": "4096",
    "cipher_memory_security": "1",
    "cipher_use_hmac": "1",
    "cipher_hmac_algorithm": "HMAC_SHA512",
}


def test_the_settings_hold_made_opened_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "cases.db"
    with make_store(path) as store, store._access.reading() as db:
        assert {name: db.rows(f"PRAGMA {name}")[0][0] for name in SETTINGS} == SETTINGS
    with open_store(path) as store, store._access.reading() as db:
        assert {name: db.rows(f"PRAGMA {name}")[0][0] for name in SETTINGS} == SETTINGS
        db._replace()
        assert {name: db.rows(f"PRAGMA {name}")[0][0] for name in SETTINGS} == SETTINGS
    assert not path.read_bytes().startswith(b"SQLite format")


def decrypted(path: Path) -> bytes:
    """All pages of a closed store in clear, free space included, as somebody with the passphrase can see them.

    SQLCipher 4: AES-256-CBC a page; the last 80 bytes are the page's IV and its HMAC, the first 16 of the file a salt.
    """
    key = unseal_store_key(Layout(path).load_key(), PASSPHRASE).data_key
    data, size = path.read_bytes(), database_module.PAGE_BYTES
    pages = []
    for start in range(0, len(data), size):
        page = data[start : start + size]
        cipher = Cipher(algorithms.AES(key), modes.CBC(page[size - 80 : size - 64])).decryptor()
        pages.append(cipher.update(page[16 if start == 0 else 0 : size - 80]))
    return b"".join(pages).lower()


def test_a_deleted_case_is_gone_inside_the_encryption_too(tmp_path: Path) -> None:
    path = tmp_path / "cases.db"
    with make_store(path) as store:
        kept, case_id = store.create_case("kept").id, plant(store)
        for number in range(50):
            store.add_message(kept, "user", f"word{number}")
    assert b"planted" in decrypted(path)
    with open_store(path) as store:
        store.delete_case(case_id)
        assert store.list_cases("word49")
    clear = decrypted(path)
    assert b"planted" not in clear and b"word49" in clear


@posix
def test_no_core_file_of_a_hardened_process() -> None:
    code = """
import ctypes, os, resource
from edgemed.clinic.store import harden_process
assert harden_process() is True
assert resource.getrlimit(resource.RLIMIT_CORE)[0] <= 1
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)  # PR_GET_DUMPABLE
os.abort()
"""
    if not sys.platform.startswith("linux"):
        pytest.skip("prctl is Linux's")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "0\n" and done.returncode == -6, done.stderr


@posix
def test_no_core_file_while_a_store_is_open(tmp_path: Path) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_CORE)
    try:
        with make_store(tmp_path / "cases.db"):
            assert resource.getrlimit(resource.RLIMIT_CORE)[0] <= 1
    finally:
        resource.setrlimit(resource.RLIMIT_CORE, before)
    assert harden.__doc__


# ---------------------------------------------------------------- backup


def test_a_backup_comes_back(tmp_path: Path) -> None:
    with make_store(tmp_path / "cases.db") as store:
        case_id = plant(store)
        own = store.backup(tmp_path / "own", "the backup's own")
        in_folder = store.backup(tmp_path)
        assert (own, in_folder) == (tmp_path / "own", tmp_path / "cases-20260301-120000.edgemed-backup")
        images = store.list_images(case_id)
        for number, (backup, passphrase) in enumerate(((own, "the backup's own"), (in_folder, PASSPHRASE))):
            with CaseStore.restore(backup, passphrase, tmp_path / str(number) / "cases.db", "Dr. Else", Clock().means()) as restored:
                assert restored.list_images(case_id) == images and restored.read_image(images[0].id) == store.read_image(images[0].id)
                assert restored.list_messages(case_id) == store.list_messages(case_id)
                assert restored.list_reports(case_id) == store.list_reports(case_id)
                assert restored.list_cases("plantedanswer") and restored.audit.verify()
                told = restored.audit.entries()[-1]
                assert (told.action, told.actor) == ("store.restored", "Dr. Else")
                assert told.detail in [entry.detail for entry in store.audit.entries() if entry.action == "store.backed_up"]
                restored.lock()
                restored.unlock(passphrase)
        assert [p for p in tmp_path.rglob("*") if ".part" in p.name] == []
        with pytest.raises(PassphraseError, match=r"^The passphrase is wrong\.$"):
            CaseStore.restore(own, PASSPHRASE, tmp_path / "no" / "cases.db", "a", Clock().means())
    assert not (tmp_path / "no").exists()


def test_what_killed_backups_left_goes_with_the_next_one(tmp_path: Path) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    old, mine = stick / ".cases-20260101-120000.edgemed-backup.x1.part", stick / ".own.x2.part"
    young, other = stick / ".cases-20260301-115900.edgemed-backup.x3.part", stick / ".film.x4.part"
    for part in (old, mine, young, other):
        part.write_bytes(b"left")
        os.utime(part, (0, 0) if part is not young else None)
    with make_store(tmp_path / "cases.db") as store:
        store.backup(stick / "own")
    left = {p.name for p in stick.iterdir()}
    assert left == {"own", young.name, other.name}, "nothing of others, and nothing that may be being written"


def test_a_backup_never_opens_the_store_it_came_from(tmp_path: Path) -> None:
    """Somebody with an old backup and its passphrase has the backup's key, and nothing of the store's, nor of the restored one's."""
    path = tmp_path / "cases.db"
    with make_store(path) as store:
        store.backup(tmp_path / "backup")
    end = backup_module.load_end(tmp_path / "backup")
    key = backup_module.unseal(end.box, backup_module.derive(PASSPHRASE, end.box.salt, end.box.cost).backup)
    CaseStore.restore(tmp_path / "backup", PASSPHRASE, tmp_path / "r" / "cases.db", "a", Clock().means()).close()
    for file in (path, tmp_path / "r" / "cases.db"):
        with pytest.raises(StoreError):
            database_module.Database.open(file, key)


def test_damaged_backups_are_refused_and_nothing_is_made(tmp_path: Path) -> None:
    with make_store(tmp_path / "cases.db") as store:
        plant(store)
        store.backup(tmp_path / "backup")
    whole = (tmp_path / "backup").read_bytes()
    middle = len(whole) // 2
    for damaged in (
        b"",
        b"short",
        bytes(5000),
        whole[:-1],
        whole[:middle],
        whole[1:],
        whole[:middle] + whole[middle + 4096 :],
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        whole[:-20] + b"\xff\xff\xff\xff" + whole[-16:],
        (tmp_path / "cases.db").read_bytes(),
    ):
        (tmp_path / "backup").write_bytes(damaged)
        with pytest.raises(StoreError, match="Expected") as told:
            CaseStore.restore(tmp_path / "backup", PASSPHRASE, tmp_path / "r" / "cases.db", "a", Clock().means())
        assert not isinstance(told.value, PassphraseError) and not (tmp_path / "r").exists()
    (tmp_path / "backup").write_bytes(whole)
    with pytest.raises(StoreError, match="found cases.db"):
        CaseStore.restore(tmp_path / "backup", PASSPHRASE, tmp_path / "cases.db", "a", Clock().means())
    with pytest.raises(InputError, match="found none"):
        CaseStore.restore(tmp_path / "nothing", PASSPHRASE, tmp_path / "r" / "cases.db", "a", Clock().means())


def test_where_a_backup_cannot_go(tmp_path: Path) -> None:
    with make_store(tmp_path / "cases.db") as store:
        before = store.audit.head()
        (tmp_path / "there").write_text("mine")
        with pytest.raises(StoreError, match="Expected no file"):
            store.backup(tmp_path / "there")
        with pytest.raises(InputError, match="Expected a folder") as told:
            store.backup(tmp_path / "media" / "stick" / "backup")
        assert "stick" in told.value.hint and not (tmp_path / "media").exists() and (tmp_path / "there").read_text() == "mine"
        with pytest.raises(PassphraseError, match="8 to 1024"):
            store.backup(tmp_path / "x", "short")
        assert store.audit.head() == before


# ---------------------------------------------------------------- full disk

FULL = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from clinic_store import FACTS, make_store, open_store
from edgemed.clinic.store.layout import Layout, unseal_store_key
from edgemed.core.errors import ResourceError

disk = Path(sys.argv[1])
ballasts = {disk / "small": 200_000, disk / "large": 5_000_000}
for ballast, size in ballasts.items():
    ballast.write_bytes(bytes(size))
store = make_store(disk / "cases" / "cases.db")
case = store.create_case("x")
images, messages = [], []

def fill(call, kept, smallest):
    size = 300_000
    while size >= smallest:
        try:
            kept.append(call(size).id)
        except ResourceError as error:
            assert "disk is full" in error.message, error.message
            size //= 2

def whole(store):
    assert [image.id for image in store.list_images(case.id)] == images
    assert [message.id for message in store.list_messages(case.id)] == messages
    assert all(len(store.read_image(image.id)) == image.size_bytes for image in store.list_images(case.id))
    return store.audit.verify()

fill(lambda size: store.add_image(case.id, "x", bytes(size), FACTS), images, 1000)
fill(lambda size: store.add_message(case.id, "user", "w" * (size // 100)), messages, 100)
whole(store)
for call in (lambda: store.backup(disk / "backup"), lambda: store.change_passphrase("correct horse battery", "another passphrase")):
    try:
        call()
    except ResourceError:
        whole(store)
    else:
        raise AssertionError("there was room")
opened = []
for ballast in ballasts:  # with a little room, closing may take it all for moving the log; with more it opens
    ballast.unlink()
    store.lock()
    try:
        store.unlock("correct horse battery")
    except ResourceError:
        assert store.locked
    opened.append(not store.locked)
assert opened[-1], opened
entries = whole(store)
messages.append(store.add_message(case.id, "user", "room again").id)
store.close()
assert whole(open_store(disk / "cases" / "cases.db")) > entries
assert not [p for p in disk.rglob("*") if ".part" in p.name]
print(len(images), len(messages))
"""


@posix
def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = [*mount("size=9m", disk), sys.executable, "-c", FULL, str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    images, messages = map(int, done.stdout.split())
    assert images > 3 and messages > 0


@posix
def test_no_room_for_a_store(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    code = """
import sys
sys.path.insert(0, "tests")
from pathlib import Path
from clinic_store import make_store
from edgemed.clinic.store.layout import Layout, unseal_store_key
from edgemed.core.errors import ResourceError
try:
    make_store(Path(sys.argv[1]) / "cases" / "cases.db")
except ResourceError as error:
    print(error.message)
print(sorted(p.name for p in Path(sys.argv[1]).rglob("*")))
"""
    command = [*mount("size=64k", disk), sys.executable, "-c", code, str(disk)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    said, left = done.stdout.splitlines()
    assert "disk is full while writing" in said and left == "['cases', 'cases.db.lock']"


def test_a_folder_that_may_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemed.core.filelock.os.open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(ResourceError, match="not permitted"):
        make_store(tmp_path / "cases.db")


# ---------------------------------------------------------------- SIGKILL and power cuts


@posix
def test_kills_and_torn_copies() -> None:
    outcomes = run(kills=3, copies=8, live=2, seed=1)
    for outcome in (outcomes["kills"], outcomes["copies"]):
        assert outcome.good and outcome.acknowledged > 3, outcome
    assert [outcomes[part].tried for part in ("kills", "copies", "live")] == [3, 8, 2]


def test_the_bench_sees_what_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "cases.db"
    CaseStore.create(path, "the first passphrase", "bench", Means(cost=KdfCost(64, 1, 1))).close()
    store, _ = open_bench(path)
    with store:
        case = store.create_case("x")
        image = store.add_image(case.id, "x", b"1", FACTS)
        message = store.add_message(case.id, "user", "x")
        report = store.save_report(Report(case.id, findings="draft 5"))
        expected = Expected()
        for what, subject, content in (
            ("case", "nowhere", ""),
            ("image", f"{case.id}/{image.id}", "00"),
            ("message", f"{case.id}/{message.id}", "00"),
            ("message", f"{case.id}/nowhere", "00"),
            ("report", f"{case.id}/{report.version}", "draft 6"),
            ("signed", f"{case.id}/{report.version}", "draft 5"),
            ("deleted", case.id, ""),
        ):
            expected.hear({"what": what, "id": subject, "content": content})
        assert len(expected.check(store)) == 7


def test_the_log_alone_grows_between_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What makes copies at any moment open: the main file stands still until the log is large, and then the log is emptied."""
    path = tmp_path / "cases.db"
    with make_store(path) as store:
        case = store.create_case("x")
        main, log = path.read_bytes(), path.with_name("cases.db-wal")
        before = log.read_bytes()
        for _ in range(20):
            store.add_image(case.id, "x", bytes(50_000), FACTS)
        assert path.read_bytes() == main and log.read_bytes().startswith(before)
        monkeypatch.setattr(database_module, "LARGE_LOG_BYTES", 1)
        store.add_message(case.id, "user", "x")
        assert path.read_bytes() != main and log.stat().st_size == 0
        assert store.audit.verify()


def test_a_killed_programs_log_is_taken_up(tmp_path: Path) -> None:
    path = tmp_path / "cases.db"
    code = f"""
import os, sys
sys.path.insert(0, "tests")
from pathlib import Path
from clinic_store import FACTS, make_store
store = make_store(Path({str(path)!r}))
case = store.create_case("x")
store.add_image(case.id, "x", b"image", FACTS)
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 9
    assert path.with_name("cases.db-wal").stat().st_size > 0
    with open_store(path) as store:
        [case] = store.list_cases()
        assert case.images == 1 and store.audit.verify() and COST == KdfCost(64, 1, 1)


def test_an_empty_log_of_a_killed_program_is_in_nobodys_way(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "cases.db")
    layout.log.touch()
    CaseStore.create(layout.db, PASSPHRASE, "a", Means(cost=COST)).close()
    open_store(layout.db).close()
    layout.db.unlink()
    layout.log.write_bytes(b"changes of a lost store")
    with pytest.raises(StoreError, match="found cases.db-wal") as told:
        layout.require_absent()
    assert "move cases.db" in told.value.hint and layout.log.exists()
