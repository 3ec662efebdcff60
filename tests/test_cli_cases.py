"""`edgemed cases` and `edgemed audit`, as a clinic's script or a person at a terminal runs them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clinic_store import AMINA, COST, PASSPHRASE, tamper

from edgemed.cli import run
from edgemed.cli.cases import actor_name, find_case
from edgemed.cli.output import escape_controls
from edgemed.clinic.records import Report
from edgemed.clinic.store import CaseStore, Means
from edgemed.core.errors import InputError
from edgemed.core.paths import store_path

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def not_hardened(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """The tests' own process stays as it is; that the commands ask for it is seen here."""
    asked: list[bool] = []
    monkeypatch.setattr("edgemed.clinic.store.harden_process", lambda: asked.append(True))
    return asked


@pytest.fixture
def store() -> Path:
    with CaseStore.create(store_path(), PASSPHRASE, "Dr. Test", Means(cost=COST)) as store:
        store.create_case("wrist \x1b[2J", AMINA)
        store.audit.append("odd\x1b[31m", "\u202etxet")
    return store_path()


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text(PASSPHRASE + "\r\nsecond line\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = run([str(a) for a in arguments])
        said = capsys.readouterr()
        return code, said.out, said.err

    yield call


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a person types at the prompts, in order."""
    answers: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt, stream: answers.pop(0))
    return answers


def test_verify_and_show(store: Path, secret: Path, call: Call, not_hardened: list[bool]) -> None:
    code, out, err = call("audit", "verify", "--passphrase-file", secret)
    assert code == 0 and out.startswith("6 entries agree") and "Note that number and hash" in err and not_hardened
    head = out.split()[-1]
    assert call("audit", "verify", "--head", head[:20], "--passphrase-file", secret)[0] == 0
    code, out, err = call("audit", "show", "--json", "--passphrase-file", secret)
    entries = json.loads(out.splitlines()[-1])["entries"]
    assert [e["number"] for e in entries] == list(range(1, 11)) and head == entries[5]["hash"] and entries[5]["actor"] == actor_name()
    assert "wrist" not in out and "Amina" not in out
    code, out, err = call("audit", "show", "--last", "9", "--passphrase-file", secret)
    assert "\x1b" not in out and "\u202e" not in out and "odd[31m" in out and "case.created" not in out


def test_verify_finds_a_change(store: Path, secret: Path, call: Call) -> None:
    tamper(store, lambda db: db.run("UPDATE cases SET label = 'x'"))
    code, out, err = call("audit", "verify", "--json", "--passphrase-file", secret)
    assert code == 1 and out == "" and err.startswith("Error: Entry 2 of the audit log speaks of case") and "\nHint: " in err


def test_backup_and_restore(store: Path, secret: Path, tmp_path: Path, call: Call) -> None:
    stick = tmp_path / "stick"
    stick.mkdir()
    code, out, _ = call("cases", "backup", stick, "--passphrase-file", secret, "--json")
    backup = Path(json.loads(out)["backup"])
    assert code == 0 and backup.parent == stick and json.loads(out)["size_bytes"] == backup.stat().st_size
    code, out, err = call("cases", "restore", backup, "--passphrase-file", secret)
    assert code == 1 and "Expected no case store" in err
    code, out, err = call("cases", "restore", backup, "--store", tmp_path / "new" / "cases.db", "--passphrase-file", secret)
    assert (code, err) == (0, "") and out.startswith("Restored 1 cases to")
    assert call("audit", "verify", "--store", tmp_path / "new" / "cases.db", "--passphrase-file", secret)[0] == 0
    code, _, err = call("cases", "restore", secret, "--store", tmp_path / "x" / "cases.db", "--passphrase-file", secret)
    assert code == 1 and "found another file or one that was cut" in err


def test_a_backup_with_a_passphrase_of_its_own(store: Path, secret: Path, tmp_path: Path, call: Call, typed: list[str]) -> None:
    typed += ["only the backup's", "only the backup's"]
    assert call("cases", "backup", tmp_path / "b1", "--passphrase-file", secret, "--own-passphrase")[0] == 0
    own = tmp_path / "own"
    own.write_text("only the backup's")
    own.chmod(0o644)
    code, _, err = call("cases", "backup", tmp_path / "b2", "--passphrase-file", secret, "--new-passphrase-file", own)
    assert code == 0 and err == f"Warning: Other users of this machine may read {own}.\n"
    for backup in ("b1", "b2"):
        new = tmp_path / f"from-{backup}" / "cases.db"
        assert call("cases", "restore", tmp_path / backup, "--store", new, "--passphrase-file", secret)[0] == 1
        typed += ["only the backup's"]
        assert call("cases", "restore", tmp_path / backup, "--store", new)[0] == 0


def test_change_of_passphrase(store: Path, call: Call, typed: list[str], tmp_path: Path, secret: Path) -> None:
    typed += [PASSPHRASE, "another passphrase", "anotter passphrase"]
    code, _, err = call("cases", "passphrase")
    assert code == 1 and "same passphrase twice" in err
    typed += [PASSPHRASE, "short", "short"]
    assert "8 to 1024 characters, found 5" in call("cases", "passphrase")[2]
    typed += [PASSPHRASE, "another passphrase", "another passphrase"]
    assert call("cases", "passphrase")[:2] == (0, "The passphrase was changed.\n")
    typed += [PASSPHRASE, "another passphrase"]
    assert "The passphrase is wrong." in call("audit", "verify")[2]
    assert call("audit", "verify")[0] == 0 and typed == []
    secret.write_text("another passphrase\n")
    (tmp_path / "new").write_text("a third passphrase")
    code, out, _ = call("cases", "passphrase", "--passphrase-file", secret, "--new-passphrase-file", tmp_path / "new", "--json")
    assert code == 0 and json.loads(out)["changed"] is True


@pytest.mark.parametrize(
    "command", [["audit", "verify"], ["audit", "show"], ["cases", "backup", "x"], ["cases", "passphrase"]], ids=" ".join
)
def test_what_is_missing_is_told_before_anybody_types(command: list[str], call: Call, typed: list[str]) -> None:
    code, out, err = call(*command)
    assert code == 1 and out == "" and "Expected a case store" in err and "Hint: Start `edgemed chat`" in err


def test_without_a_terminal(store: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    code, _, err = call("audit", "verify")
    assert code == 1 and "--passphrase-file" in err
    (tmp_path / "odd").write_bytes(b"\xff\xfe")
    assert "UTF-8" in call("audit", "verify", "--passphrase-file", tmp_path / "odd")[2]
    assert "found none" in call("audit", "verify", "--passphrase-file", tmp_path / "nothing")[2]


def test_the_input_ends_at_the_prompt(store: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(prompt: str, stream: object) -> str:
        raise EOFError

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", ended)
    code, _, err = call("audit", "verify")
    assert code == 1 and "end of the input" in err


def test_an_account_without_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: (_ for _ in ()).throw(KeyError("uid not found")))
    assert actor_name() == "unknown"


def test_list_and_export(store: Path, secret: Path, call: Call, tmp_path: Path) -> None:
    with CaseStore.open(store, PASSPHRASE, "Dr. Test", Means(cost=COST)) as cases:
        case = cases.list_cases()[0]
        cases.save_report(Report(case.id, findings="Amina has no fracture."))
        cases.set_setting("language", "fr")
    code, out, _ = call("cases", "list", "--passphrase-file", secret)
    assert code == 0 and case.id[:12] in out and "wrist [2J" in out and "\x1b" not in out and "Amina" not in out
    listed = json.loads(call("cases", "list", "--json", "--passphrase-file", secret)[1])["cases"]
    assert [one["id"] for one in listed] == [case.id] and listed[0]["signed"] is False
    folder = tmp_path / "out"
    folder.mkdir()
    code, out, err = call("cases", "export", case.id[:8], "--to", folder, "--as", "pdf, md", "--passphrase-file", secret)
    assert (code, err) == (0, "") and len(out.splitlines()) == 2 and all(Path(line).is_file() for line in out.splitlines())
    text = next(folder.glob("*.md")).read_text()
    assert "Amina" not in text and "Constatations" in text
    code, out, _ = call(
        *("cases", "export", case.label, "--to", folder, "--as", "md", "--with-identity", "--language", "en", "--json"),
        *("--passphrase-file", secret),
    )
    assert code == 0 and json.loads(out)["with_identity"] is True and "Amina" in next(folder.glob("*.md")).read_text()
    assert [line for line in call("audit", "show", "--passphrase-file", secret)[1].splitlines() if " export " in line]


@pytest.mark.parametrize(
    ("case", "more", "said"),
    [
        ("ffffffff", [], "found none"),
        ("wrist", [], "found none"),
        ("x", ["--to", "/nowhere/at-all"], "Expected a folder at"),
        ("x", ["--as", "docx"], "found 'docx'"),
        ("x", ["--language", "tlh"], "Expected a language"),
    ],
)
def test_what_cannot_be_exported(store: Path, secret: Path, call: Call, tmp_path: Path, case: str, more: list[str], said: str) -> None:
    code, out, err = call("cases", "export", case, "--to", tmp_path, "--passphrase-file", secret, *more)
    assert code == 1 and out == "" and said in err and "\nHint: " in err


def test_a_beginning_or_a_label_of_two_cases_means_none(store: Path) -> None:
    with CaseStore.open(store, PASSPHRASE, "Dr. Test", Means(cost=COST, new_id=iter(["ab" * 16, "ab" * 15 + "ff"]).__next__)) as cases:
        first, second = cases.create_case("knee"), cases.create_case("knee")
        for wanted in ("knee", "ababababab", "abab"):
            with pytest.raises(InputError):
                find_case(cases, wanted)
        assert find_case(cases, second.id) == cases.load_case(second.id) and find_case(cases, f" {first.id.upper()} ").id == first.id


def test_names_do_not_steer_the_terminal(call: Call, tmp_path: Path) -> None:
    code, out, err = call("ask", "What?", "--image", tmp_path / "a\x1b]0;x\x07\x9b31m.png", "--model", tmp_path)
    assert code == 1 and not set(out + err) & {"\x1b", "\x07", "\x9b"}
    line = json.dumps({"answer": "a\x9b31m\u202eb\x7f é"}, ensure_ascii=False)
    assert escape_controls(line).isprintable() and json.loads(escape_controls(line)) == json.loads(line)
