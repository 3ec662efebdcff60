"""The audit log: everything is noted, and whatever is changed behind its back is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from clinic_store import AMINA, FACTS, PASSPHRASE, Clock, make_store, open_store, tamper

from edgemed.clinic.records import ModelIdentity, PatientIdentity, Report, View
from edgemed.clinic.store.chain import append_entry, entry_hash, load_entries
from edgemed.clinic.store.database import Database
from edgemed.clinic.store.rows import spell, spell_time
from edgemed.core.errors import AuditError, InputError, StoreError

MODEL = ModelIdentity("demo", "Q4_K_M", "ab" * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed store in which everything was done once."""
    path = tmp_path / "cases.db"
    with make_store(path) as store:
        case = store.create_case("SECRET label", AMINA)
        image = store.add_image(case.id, "SECRET.png", b"SECRET pixels", FACTS)
        store.save_view(image.id, View(1))
        store.add_message(case.id, "user", "SECRET question")
        store.add_message(case.id, "assistant", "SECRET answer", model=MODEL)
        store.save_report(Report(case.id, findings="SECRET finding", drafted_by=MODEL))
        store.sign_report(case.id, "Dr. Test")
        store.rename_case(case.id, "SECRET other")
        store.save_identity(case.id, PatientIdentity("SECRET^Amina"))
        store.set_setting("language", "sw")
        store.audit.append("report.exported", case.id, MODEL.sha256, {"kind": "pdf", "sha256": "cd" * 32})
        store.backup(tmp_path / "backup")
        store.change_passphrase(PASSPHRASE, PASSPHRASE + " 2")
        store.change_passphrase(PASSPHRASE + " 2", PASSPHRASE)
        store.delete_case(store.create_case("SECRET gone").id)
    return path


def test_everything_is_noted_without_content(path: Path) -> None:
    with open_store(path) as store:
        entries = store.audit.entries()
        assert [entry.action for entry in entries] == [
            "store.created",
            "case.created",
            "identity.saved",
            "image.added",
            "image.viewed",
            "message.added",
            "message.added",
            "report.saved",
            "report.signed",
            "case.renamed",
            "identity.saved",
            "setting.changed",
            "report.exported",
            "store.backed_up",
            "passphrase.changed",
            "passphrase.changed",
            "case.created",
            "case.deleted",
            "store.locked",
            "store.opened",
        ]
        assert [entry.number for entry in entries] == list(range(1, 21))
        assert {entry.actor for entry in entries} == {"Dr. Test"} and entries[6].model_sha256 == MODEL.sha256
        assert entries[3].detail["sha256"] == hashlib.sha256(b"SECRET pixels").hexdigest()
        assert store.audit.verify() == 20 and store.audit.head() == (20, entries[-1].hash)
        assert store.audit.entries(first=3, limit=2) == entries[2:4]
        said = repr(entries)
    for content in ("SECRET", "Amina", "Tour", "4711", "sw"):
        assert content not in said.replace("message.", "")
    answer = hashlib.sha256(b"SECRET answer").hexdigest()
    assert answer not in said  # a short answer's plain hash could be guessed


def test_a_log_that_was_handed_out_is_checked_without_us(path: Path) -> None:
    with open_store(path) as store:
        handed_out = json.dumps([asdict(entry) | {"at": spell_time(entry.at)} for entry in store.audit.entries()])
    previous = "0" * 64
    for e in json.loads(handed_out):
        fields = [previous, e["number"], e["at"], e["actor"], e["action"], e["subject"], e["model_sha256"], e["detail"]]
        previous = hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert previous == e["hash"]


def test_a_noted_head_is_found_later(path: Path) -> None:
    with open_store(path) as store:
        number, head = store.audit.head()
        store.audit.append("something")
        for spelled in (head, head[:16], head.upper(), f" {number}:{head[:32]} {head[32:]}"):
            assert store.audit.verify(spelled) == number + 1
        with pytest.raises(AuditError, match="noted hash"):
            store.audit.verify("0" * 64)
        for wrong in ("", "abc", "x" * 64, head + "0"):
            with pytest.raises(InputError, match="16 to 64 hex digits"):
                store.audit.verify(wrong)


def test_only_ids_and_hashes_can_be_appended(path: Path) -> None:
    with open_store(path) as store:
        before = store.audit.head()
        for action, detail in (
            ("x", {"text": "word " * 100}),
            ("x", {"record": "00"}),
            ("x", {"record_kind": "case"}),
            ("case.deleted", {}),
        ):
            with pytest.raises(ValueError, match="an entry holds|the store alone"):
                store.audit.append(action, detail=detail)
        assert store.audit.head() == before
        entry = store.audit.append("report.exported", "a\udcffb", detail={"kind": "pdf\udcff"})
        assert store.audit.entries()[-1] == entry and store.audit.verify() == before[0] + 1


def without_guards(sql: str) -> Callable[[Database], None]:
    """Statements with the table's triggers out of the way."""

    def change(db: Database) -> None:
        for trigger in ("audit_update", "audit_delete", "report_signed"):
            db.run(f"DROP TRIGGER {trigger}")
        for statement in sql.split(";"):
            assert db.run(statement), f"nothing changed: {statement}"

    return change


CHANGES = [
    ("UPDATE audit SET actor = 'Dr. Else' WHERE number = 6", "Entry 6 of the audit log was changed"),
    ("UPDATE audit SET at = replace(at, '2026', '2025') WHERE number = 6", "Entry 6 of the audit log was changed"),
    ("UPDATE audit SET action = 'x' WHERE number = 1", "Entry 1 of the audit log was changed"),
    ("UPDATE audit SET subject = '' WHERE number = 18", "Entry 18 of the audit log was changed"),
    ("UPDATE audit SET model_sha256 = '' WHERE number = 7", "Entry 7 of the audit log was changed"),
    ("UPDATE audit SET detail = '{}' WHERE number = 7", "Entry 7 of the audit log was changed"),
    ("UPDATE audit SET detail = 'x' WHERE number = 7", "Entry 7 of the audit log was changed"),
    ("UPDATE audit SET detail = '[1]' WHERE number = 7", "Entry 7 of the audit log was changed"),
    ("UPDATE audit SET at = 'x' WHERE number = 7", "Entry 7 of the audit log was changed"),
    ("UPDATE audit SET hash = '' WHERE number = 7", "Entry 7 of the audit log was changed"),
    ("DELETE FROM audit WHERE number = 7", "Entry 7 of the audit log is missing"),
    ("DELETE FROM audit WHERE number = 1", "Entry 1 of the audit log is missing"),
    ("DELETE FROM audit WHERE number > 17", "Entry 18 of the audit log is missing"),
    ("UPDATE audit SET number = 99 WHERE number = 7", "Entry 7 of the audit log is missing"),
    ("UPDATE message SET text = 'Yes.' WHERE role = 'assistant'", "Entry 7 of the audit log speaks of message .* found a changed one"),
    ("UPDATE message SET created = replace(created, '2026', '2025') WHERE role = 'user'", "Entry 6 of the audit log speaks of message"),
    ("UPDATE message SET verdict = 'refer' WHERE role = 'user'", "Entry 6 of the audit log speaks of message"),
    ("UPDATE message SET place = 99 WHERE role = 'user'", "Entry 6 of the audit log speaks of message"),  # their order
    ("DELETE FROM message WHERE role = 'user'", "Entry 6 of the audit log speaks of message .* found none"),
    ("INSERT INTO message SELECT 99, 'new', case_id, role, text, created, images, model, state, confidence, verdict FROM message LIMIT 1",
     "an entry of the audit log for message new, found none"),
    ("UPDATE report SET findings = 'none'", "Entry 9 of the audit log speaks of report"),
    ("UPDATE report SET signed_by = 'Dr. Else'", "Entry 9 of the audit log speaks of report"),
    ("UPDATE identity SET name = 'Somebody^Else'", "Entry 11 of the audit log speaks of identity"),
    ("UPDATE cases SET label = 'x'", "Entry 10 of the audit log speaks of case"),
    ("UPDATE image SET view = '{}'", "Entry 5 of the audit log speaks of image"),
    ("UPDATE image_data SET data = x'00'", "Entry 5 of the audit log speaks of image .* found other bytes"),
    ("DELETE FROM image_data", "Entry 5 of the audit log speaks of image .* found other bytes"),
    ("UPDATE setting SET value = 'fr'", "Entry 12 of the audit log speaks of setting language"),
    ("DELETE FROM cases", "Entry 5 of the audit log speaks of image"),
    ("UPDATE message SET text = x'00' WHERE role = 'user'", "Entry 6 of the audit log speaks of message"),
    ("UPDATE image_data SET data = 'SECRET pixels'", "Entry 5 of the audit log speaks of image .* found other bytes"),
    ("UPDATE audit SET actor = x'00' WHERE number = 7", "Entry 7 of the audit log was changed"),
    ("UPDATE audit SET detail = x'00' WHERE number = 7", "Entry 7 of the audit log was changed"),
    ("DELETE FROM meta WHERE name = 'audit_head'", "Entry 1 of the audit log|refused a change"),
    ("UPDATE meta SET value = x'00' WHERE name = 'audit_head'", "newest number and hash"),
    ("UPDATE meta SET value = 'x' WHERE name = 'audit_head'", "newest number and hash"),
    ("UPDATE meta SET value = '3:' || substr(value, 4) WHERE name = 'audit_head'", "refused a change"),
    ("DELETE FROM meta WHERE name = 'record_key'", "audit log's key"),
    ("UPDATE meta SET value = 'x' WHERE name = 'record_key'", "audit log's key"),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "says"), CHANGES, ids=[sql for sql, _ in CHANGES])
def test_every_change_behind_its_back_is_found(path: Path, sql: str, says: str) -> None:
    tamper(path, without_guards(sql))
    with pytest.raises(StoreError, match=says), open_store(path) as store:  # opening adds an entry, which hides nothing
        store.audit.verify()


def test_a_log_written_anew_is_found_by_a_noted_head(path: Path) -> None:
    with open_store(path) as store:
        _, head = store.audit.head()

    def rewrite(db: Database) -> None:
        """What somebody with the passphrase and this source can do: another actor in each entry, all hashes computed again."""
        db.run("DROP TRIGGER audit_delete")
        entries = load_entries(db)
        db.run("DELETE FROM audit")
        db.run("DELETE FROM meta WHERE name = 'audit_head'")
        for entry in entries:
            append_entry(db, type(entry)(**(asdict(entry) | {"actor": "Dr. Else"})))

    tamper(path, rewrite)
    with open_store(path) as store:
        assert store.audit.verify()
        with pytest.raises(AuditError, match="was cut or written anew"):
            store.audit.verify(head)


def test_a_backup_put_back_lacks_what_came_after(path: Path, tmp_path: Path) -> None:
    from edgemed.clinic.store import CaseStore

    with open_store(path) as store:
        store.backup(tmp_path / "first")
        store.audit.append("later")
        _, head = store.audit.head()
    with CaseStore.restore(tmp_path / "first", PASSPHRASE, tmp_path / "r" / "cases.db", "Dr. Test", Clock().means()) as restored:
        assert restored.audit.verify() and restored.audit.entries()[-1].action == "store.restored"
        with pytest.raises(AuditError, match="noted hash"):
            restored.audit.verify(head)


def test_a_change_and_its_entry_are_one(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the entry cannot be written, there is no change either."""
    with open_store(path) as store:
        case = store.list_cases()[0]
        before = store.audit.head(), store.list_messages(case.id), store.list_cases()
        with monkeypatch.context() as patched:
            patched.setattr("edgemed.clinic.store.access.append_entry", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            for call in (
                lambda: store.add_message(case.id, "user", "x"),
                lambda: store.delete_case(case.id),
                lambda: store.create_case("x", AMINA),
                lambda: store.add_image(case.id, "x", b"x", FACTS),
                lambda: store.set_setting("language", "en"),
            ):
                with pytest.raises(KeyboardInterrupt):
                    call()
        assert (store.audit.head(), store.list_messages(case.id), store.list_cases()) == before
        assert store.get_setting("language") == "sw" and store.audit.verify()


def test_a_log_of_many_pieces(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgemed.clinic.store.chain.PIECE", 3)
    for count in (20, 22, 24):  # 21 is a multiple of a piece
        with open_store(path) as store:
            assert store.audit.verify() == count
    with open_store(path) as store:
        store.audit.append("one more")
        assert store.audit.verify() == 27


def test_the_hash_covers_every_field(path: Path) -> None:
    with open_store(path) as store:
        entry = store.audit.entries()[6]
    hashes = {entry_hash(entry, "0" * 64), entry_hash(entry, "1" * 64)}
    for field, value in {
        "number": 1,
        "actor": "x",
        "action": "x",
        "subject": "x",
        "model_sha256": "x",
        "detail": {},
        "at": Clock().wall,
    }.items():
        hashes.add(entry_hash(type(entry)(**(asdict(entry) | {field: value})), "0" * 64))
    assert len(hashes) == 9 and spell({"b": "é", "a": 1}) == '{"a":1,"b":"\\u00e9"}'
