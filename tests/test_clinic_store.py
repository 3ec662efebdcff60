"""The case store as the screens use it: cases, images, messages, reports, search, settings, threads."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from clinic_store import AMINA, FACTS, Clock, make_store, open_store, tamper

from edgemed.clinic.records import (
    Box,
    Confidence,
    ImageFacts,
    ModelIdentity,
    PatientIdentity,
    Report,
    SeenImage,
    View,
    Window,
)
from edgemed.clinic.store import CaseStore, images
from edgemed.core.errors import InputError, StoreError
from edgemed.core.paths import data_dir, store_path

MODEL = ModelIdentity("edgemed-demo", "Q4_K_M", "ab" * 32)
VIEW = View(2, Window(40.5, 400.0, "sigmoid", "soft"), True, (Box(1, 2, 3, 4), Box(5, 6, 7, 8)))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CaseStore]:
    with make_store(tmp_path / "cases" / "cases.db") as store:
        yield store


def test_where_the_store_lies() -> None:
    assert store_path() == data_dir() / "cases" / "cases.db"


def test_everything_comes_back_as_it_went_in(store: CaseStore) -> None:
    case = store.create_case("wrist, left", AMINA)
    facts = ImageFacts("dicom", 4, 3, 7, "DX", "WRIST", "PA", "L", "Röntgen", ("burnt-in text",))
    image = store.add_image(case.id, "a.dcm", b"\0\xff pixels", facts, VIEW)
    plain = store.add_image(case.id, "b.png", b"", FACTS)
    seen = (SeenImage(image.id, VIEW, "cd" * 32), SeenImage(plain.id, View(), "ef" * 32))
    asked = store.add_message(case.id, "user", "Is there a\nfracture? 骨折", seen)
    told = store.add_message(case.id, "assistant", "No.", seen, MODEL, "stopped", Confidence(0.75, "slake"), "refer")
    report = store.save_report(Report(case.id, 1, "f", "i", "r", MODEL, True))
    store.lock()
    store.unlock("correct horse battery")
    assert store.list_images(case.id) == [image, plain] and image.facts == facts and image.view == VIEW and plain.view == View()
    assert (store.read_image(image.id), store.read_image(plain.id)) == (b"\0\xff pixels", b"")
    assert store.list_messages(case.id) == [asked, told]
    assert (asked.images, told.confidence, told.state, told.verdict, told.model) == (
        seen,
        Confidence(0.75, "slake"),
        "stopped",
        "refer",
        MODEL,
    )
    assert store.load_report(case.id) == report and store.load_identity(case.id) == AMINA
    [listed] = store.list_cases()
    assert (listed.id, listed.label, listed.images, listed.messages, listed.signed) == (case.id, "wrist, left", 2, 2, False)
    assert listed.created == case.created and listed.changed > case.changed and listed.created.tzinfo is not None


def test_what_is_not_unicode_is_spelled_out(store: CaseStore) -> None:
    case = store.create_case("a\udcffb", PatientIdentity(name="x\udc80"))
    image = store.add_image(case.id, "n\udcff\x1b[2J\0.png", b"1", FACTS)
    message = store.add_message(case.id, "user", "t\ud800\0t")
    assert case.label == "a\\udcffb" and store.load_identity(case.id).name == "x\\udc80"
    assert store.list_images(case.id) == [image] and image.name == "n\\udcff\x1b[2J\0.png"
    assert store.list_messages(case.id) == [message] and message.text == "t\\ud800\0t"
    assert store.audit.verify()


def test_the_newest_change_comes_first(store: CaseStore) -> None:
    first, second, third = (store.create_case(name) for name in ("one", "two", "three"))
    assert [case.label for case in store.list_cases()] == ["three", "two", "one"]
    store.add_message(first.id, "user", "hello")
    store.rename_case(second.id, "zwei")
    assert [case.label for case in store.list_cases()] == ["zwei", "one", "three"]
    assert [case.label for case in store.list_cases(limit=2)] == ["zwei", "one"]
    store.delete_case(third.id)
    assert [case.label for case in store.list_cases()] == ["zwei", "one"]


SEARCHES = [
    ("wrist", "a"),
    ("WRI", "a"),
    ("toure amina", "a"),
    ("Touré", "a"),
    ("amina fracture", "a"),
    ("P-4711", "a"),
    ("eleve", "b"),
    ("كسر", "b"),
    ("fra", "ab"),
    ("effusion", "b"),
    ("draft", ""),
    ("rist", ""),
    ("amina effusion", ""),
    ('"fracture', "ab"),
    ("label OR wrist*", ""),
    ("wrist NOT fracture", ""),
    ("- ( * ^ \x00", ""),
    ("", "ab"),
    ("   ", "ab"),
]


@pytest.mark.parametrize(("search", "found"), SEARCHES)
def test_search(store: CaseStore, search: str, found: str) -> None:
    a = store.create_case("Wrist, left", AMINA)
    store.add_message(a.id, "user", "Is there a FRACTURE?")
    b = store.create_case("Élève")
    store.add_message(b.id, "assistant", "هل يوجد كسر a fracture-like line")
    store.save_report(Report(b.id, findings="draft"))
    store.save_report(Report(b.id, findings="none", impression="pleural effusion"))  # what was overwritten is found no more
    names = {a.id: "a", b.id: "b"}
    assert "".join(sorted(names[case.id] for case in store.list_cases(search))) == found


def test_a_deleted_case_is_gone_with_all_that_is_its(store: CaseStore) -> None:
    kept, gone = store.create_case("kept", AMINA), store.create_case("gone", AMINA)
    image = store.add_image(gone.id, "x", bytes(3_000_000), FACTS)
    store.add_message(gone.id, "user", "words")
    store.save_report(Report(gone.id, findings="f"))
    store.lock()
    store.unlock("correct horse battery")
    before = store.path.stat().st_size
    store.delete_case(gone.id)
    assert store.path.stat().st_size < before - 2_900_000  # its pages were given back
    assert [case.id for case in store.list_cases()] == [kept.id] and not store.list_cases("words") and len(store.list_cases("amina")) == 1
    with store._access.reading() as db:
        tables = ("identity", "image", "image_data", "message", "report", "document", "words")
        assert {t: db.rows(f"SELECT count(*) FROM {t}")[0][0] for t in tables} == dict.fromkeys(tables, 0) | {
            "identity": 1,
            "document": 2,
            "words": 2,
        }
        assert db.rows("PRAGMA integrity_check") == [("ok",)]
    for missing in (
        lambda: store.load_case(gone.id),
        lambda: store.list_images(gone.id),
        lambda: store.list_messages(gone.id),
        lambda: store.load_report(gone.id),
        lambda: store.load_identity(gone.id),
        lambda: store.delete_case(gone.id),
        lambda: store.rename_case(gone.id, "x"),
        lambda: store.add_message(gone.id, "user", "x"),
        lambda: store.add_image(gone.id, "x", b"", FACTS),
        lambda: store.save_report(Report(gone.id)),
        lambda: store.sign_report(gone.id, "x"),
        lambda: store.read_image(image.id),
        lambda: store.save_view(image.id, VIEW),
    ):
        with pytest.raises(StoreError, match="Expected"):
            missing()
    assert store.audit.verify()


def test_a_view_is_kept_and_noted_once(store: CaseStore) -> None:
    case = store.create_case("x")
    image = store.add_image(case.id, "x", b"1", FACTS)
    before = store.audit.head()[0]
    store.save_view(image.id, VIEW)
    store.save_view(image.id, VIEW)
    assert store.list_images(case.id) == [dataclasses.replace(image, view=VIEW)]
    assert store.audit.head()[0] == before + 1


def test_an_image_that_is_too_large(store: CaseStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MOST_IMAGE_BYTES", 1 << 20)
    case = store.create_case("x")
    with pytest.raises(InputError, match="at most 1 MiB, found 2 MiB"):
        store.add_image(case.id, "x", bytes(2 << 20), FACTS)
    assert store.list_images(case.id) == []


def test_image_bytes_that_changed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "cases.db"
    with make_store(path) as store:
        image = store.add_image(store.create_case("x").id, "x", b"right", FACTS)
    tamper(path, lambda db: db.run("UPDATE image_data SET data = ?", (b"wrong",)))
    with open_store(path) as store, pytest.raises(StoreError, match="found others"):
        store.read_image(image.id)


# ---------------------------------------------------------------- reports


def test_drafts_are_overwritten_and_signed_versions_followed(store: CaseStore) -> None:
    case = store.create_case("x")
    assert store.load_report(case.id) is None
    first = store.save_report(Report(case.id, findings="a", drafted_by=MODEL))
    edited = store.save_report(dataclasses.replace(first, findings="b", edited=True))
    assert (first.version, edited.version, len(store.list_reports(case.id))) == (1, 1, 1)
    signed = store.sign_report(case.id, "  Dr. A ")
    assert (signed.version, signed.signed_by, signed.findings) == (1, "Dr. A", "b") and signed.signed_at is not None
    assert store.load_case(case.id).signed
    assert store.save_report(signed) == signed and len(store.list_reports(case.id)) == 1  # nothing was changed
    second = store.save_report(dataclasses.replace(signed, findings="c"))
    assert (second.version, second.signed_by, second.signed_at) == (2, "", None)
    assert not store.load_case(case.id).signed
    assert store.list_reports(case.id) == [signed, second] and store.load_report(case.id) == second
    with pytest.raises(StoreError, match="changes to version 2 of the report, found some to version 1"):
        store.save_report(dataclasses.replace(signed, findings="d"))
    assert store.sign_report(case.id, "Dr. B").version == 2
    assert store.audit.verify()


def test_a_caller_cannot_sign_by_saving(store: CaseStore) -> None:
    case = store.create_case("x")
    saved = store.save_report(Report(case.id, findings="a", signed_by="Dr. Nobody", signed_at=case.created))
    assert saved.signed_by == "" and store.load_report(case.id) == saved


def test_what_cannot_be_signed(store: CaseStore) -> None:
    case = store.create_case("x")
    with pytest.raises(StoreError, match="found none or an empty one"):
        store.sign_report(case.id, "Dr. A")
    store.save_report(Report(case.id, findings=" "))
    with pytest.raises(StoreError, match="found none or an empty one"):
        store.sign_report(case.id, "Dr. A")
    store.save_report(Report(case.id, findings="a"))
    with pytest.raises(StoreError, match="Expected a name"):
        store.sign_report(case.id, "  ")
    store.sign_report(case.id, "Dr. A")
    with pytest.raises(StoreError, match="version 1, which is signed"):
        store.sign_report(case.id, "Dr. B")


def test_the_table_itself_guards_signed_reports_and_the_log(store: CaseStore) -> None:
    case = store.create_case("x")
    store.save_report(Report(case.id, findings="a"))
    store.sign_report(case.id, "Dr. A")
    with store._access.reading() as db:
        for sql in ("UPDATE report SET findings = 'b'", "UPDATE audit SET actor = 'b'", "DELETE FROM audit"):
            with pytest.raises(StoreError, match="refused a change"):
                db.run(sql)


# ---------------------------------------------------------------- settings, threads, imports


def test_settings(store: CaseStore) -> None:
    assert (store.get_setting("language"), store.get_setting("language", "en")) == ("", "en")
    store.set_setting("language", "sw")
    before = store.audit.head()
    store.set_setting("language", "sw")
    assert store.get_setting("language") == "sw" and store.audit.head() == before
    store.set_setting("language", "ar")
    store.lock()
    store.unlock("correct horse battery")
    assert store.get_setting("language", "en") == "ar" and store.audit.verify()


def test_several_threads(store: CaseStore) -> None:
    case = store.create_case("x")

    def work(number: int) -> str:
        image = store.add_image(case.id, str(number), str(number).encode() * 1000, FACTS)
        store.add_message(case.id, "user", str(number))
        assert store.read_image(image.id) == str(number).encode() * 1000
        assert store.list_messages(case.id)
        return image.id

    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(work, range(40)))
    assert len(set(ids)) == 40 and {image.id for image in store.list_images(case.id)} == set(ids)
    assert sorted(int(message.text) for message in store.list_messages(case.id)) == list(range(40))
    assert store.audit.verify() == store.audit.head()[0] == 1 + 1 + 80


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, edgemed.clinic.store; "
        "print([m for m in ('sqlcipher3', 'argon2', 'cryptography', 'numpy', 'PIL', 'ctypes') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["sqlcipher3", "argon2", "cryptography"])
def test_a_missing_extra_is_one_sentence(tmp_path: Path, package: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from pathlib import Path
from edgemed.core.errors import MissingExtraError
from edgemed.clinic.store import CaseStore, KdfCost, Means
try:
    CaseStore.create(Path({str(tmp_path / "cases.db")!r}), "long enough", "a", Means(cost=KdfCost(64, 1, 1)))
except MissingExtraError as error:
    print(error.hint)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert "edgemed[clinic]" in done.stdout


def test_a_locked_store_says_so(store: CaseStore) -> None:
    case = store.create_case("x")
    store.lock()
    store.lock()
    for call in (
        store.list_cases,
        lambda: store.create_case("x"),
        lambda: store.read_image("x"),
        lambda: store.add_message(case.id, "user", "x"),
        lambda: store.get_setting("x"),
        lambda: store.set_setting("x", "y"),
        lambda: store.audit.append("x"),
        store.audit.head,
        store.audit.verify,
        lambda: store.backup(Path("x")),
        lambda: store.change_passphrase("correct horse battery", "another passphrase"),
    ):
        with pytest.raises(StoreError, match="is locked"):
            call()
    assert store.locked


def test_auto_lock(tmp_path: Path) -> None:
    clock = Clock()
    with make_store(tmp_path / "cases.db", clock) as store:
        clock.pass_s(299)
        assert not store.lock_if_idle()
        store.touch()
        clock.pass_s(299)
        store.list_cases()  # work of the program's own is not somebody there
        assert not store.lock_if_idle() and store.lock_if_idle(now=clock.idle_s + 1) and store.locked
        assert not store.lock_if_idle(now=clock.idle_s + 1000)
        store.unlock("correct horse battery")
        assert store.audit.entries(first=2)[0].detail == {"why": "idle"}
        store.set_setting("lock_after_s", "20")
        clock.pass_s(20)
        assert store.lock_if_idle()
        store.unlock("correct horse battery")  # the setting is read again, and the wait begins anew
        assert not store.lock_if_idle() and store.lock_if_idle(now=clock.idle_s + 20)
        store.unlock("correct horse battery")
        for never in ("0", "-5"):
            store.set_setting("lock_after_s", never)
            assert not store.lock_if_idle(now=clock.idle_s + 1e9)
        store.set_setting("lock_after_s", "soon")
        assert store.lock_if_idle(now=clock.idle_s + 300)
