"""`edgemed cases` and `edgemed audit`: list, export, backup, restore and passphrase of the case store, and its audit log.

The passphrase is typed without echo, or read from a file by scripts; it is never an argument, which other users of a machine can see.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgemed.cli.options import (
    BackupFile,
    BackupTarget,
    CaseName,
    ExportFolder,
    ExportKinds,
    Head,
    Institution,
    Json,
    Last,
    NewPassphraseFile,
    OwnPassphrase,
    PassphraseFile,
    Quiet,
    ReportLanguage,
    Store,
    WithIdentity,
)
from edgemed.cli.output import Output

if TYPE_CHECKING:
    from edgemed.clinic.records import AuditEntry, Case
    from edgemed.clinic.store import CaseStore

app = typer.Typer(help="The clinic's case store: list, export, backup, restore, passphrase.", no_args_is_help=True, rich_markup_mode=None)
audit = typer.Typer(help="The case store's audit log.", no_args_is_help=True, rich_markup_mode=None)

_LONGEST_LINE = 4096
# Of a case's number, as much as a list shows; fewer digits than the second could be a label's.
_SHOWN_DIGITS, _LEAST_DIGITS = 12, 6


def actor_name() -> str:
    """Who is at this machine, for the audit log: the account's name."""
    import getpass

    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):  # an account without a name, as in some containers
        return "unknown"


def store_file(store: Path | None) -> Path:
    """`--store`, or the store of this account."""
    from edgemed.core.paths import store_path

    return store if store is not None else store_path()


def read_passphrase(file: Path | None, prompt: str, out: Output) -> str:
    """A passphrase from a file's first line, or typed without echo."""
    if file is None:
        return _ask(prompt)
    from edgemed.core.errors import InputError
    from edgemed.core.files import os_errors

    with os_errors(file), file.open("rb") as f:
        line = f.readline(_LONGEST_LINE)
        if os.name == "posix" and os.fstat(f.fileno()).st_mode & 0o077:
            out.warn(f"Other users of this machine may read {file}.")
    try:
        return line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"Expected a passphrase as UTF-8 text in {file}, found other bytes.", "Save the file as UTF-8.") from error


def read_new_passphrase(file: Path | None, what: str, out: Output) -> str:
    """A passphrase that is set: typed twice."""
    from edgemed.core.errors import PassphraseError

    first = read_passphrase(file, f"{what}: ", out)
    if file is None and _ask(f"{what}, again: ") != first:
        raise PassphraseError("Expected the same passphrase twice, found two.", "Type it again.")
    return first


def _ask(prompt: str) -> str:
    import getpass

    from edgemed.core.errors import InputError

    if not sys.stdin.isatty():
        raise InputError("Expected a terminal to type the passphrase on, found none.", "Give it with --passphrase-file FILE.")
    try:
        return getpass.getpass(prompt, stream=sys.stderr)
    except EOFError as error:
        raise InputError("Expected a passphrase, found the end of the input.", "Type it, or use --passphrase-file FILE.") from error


def open_store(store: Path | None, passphrase_file: Path | None, out: Output) -> CaseStore:
    """The store, opened. That it is there is checked before anybody types."""
    from edgemed.clinic.store import CaseStore, harden_process
    from edgemed.clinic.store.layout import Layout

    harden_process()
    path = store_file(store)
    Layout(path).require_present()
    return CaseStore.open(path, read_passphrase(passphrase_file, "Passphrase: ", out), actor_name())


@app.command("list")
def list_cases(store: Store = None, passphrase_file: PassphraseFile = None, json: Json = False, quiet: Quiet = False) -> None:
    """List the cases, the one changed last on top. Shows labels, never who the patient is."""
    out = Output(json=json, quiet=quiet)
    with open_store(store, passphrase_file, out) as cases:
        found = cases.list_cases(limit=-1)
    out.table("", ("case", "label", "images", "messages", "changed (UTC)", "report"), [_describe_case(case) for case in found])
    out.result({"cases": [asdict(case) | {"created": _spell(case.created), "changed": _spell(case.changed)} for case in found]})


@app.command("export")
def export_cases(
    case: CaseName,
    to: ExportFolder,
    kinds: ExportKinds = "pdf",
    with_identity: WithIdentity = False,
    institution: Institution = "",
    language: ReportLanguage = "",
    store: Store = None,
    passphrase_file: PassphraseFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a case's report as files. Without --with-identity nothing in them says who the patient is."""
    from edgemed.clinic.exporting import ExportWish, check_wish, export_case
    from edgemed.tui.i18n import choose_language, translator

    out = Output(json=json, quiet=quiet)
    wish = ExportWish(to, tuple(kind.strip() for kind in kinds.split(",") if kind.strip()), with_identity, institution)
    check_wish(wish)  # before anybody types
    chosen = choose_language(language) if language else ""
    with open_store(store, passphrase_file, out) as cases:
        wish = replace(wish, language=chosen or choose_language(None, cases.get_setting("language")))
        found = find_case(cases, case)
        written = export_case(cases, found.id, wish, translator(wish.language).gettext)
    for path in written:
        out.text(str(path))
    out.result({"case": found.id, "files": written, "with_identity": with_identity})


def find_case(store: CaseStore, wanted: str) -> Case:
    """The case of a number, its beginning, or a label. Raises InputError where there is none, or more than one."""
    from edgemed.core.errors import InputError

    cases = store.list_cases(limit=-1)
    begins = wanted.strip().lower()
    found = [case for case in cases if len(begins) >= _LEAST_DIGITS and case.id.startswith(begins)]
    found = found or [case for case in cases if case.label == wanted]
    if len(found) != 1:
        raise InputError(f"Expected one case with that number or label, found {len(found) or 'none'}.", "See: edgemed cases list")
    return found[0]


def _describe_case(case: Case) -> tuple[str, ...]:
    from edgemed.core.text import one_line

    signed = "signed" if case.signed else ""
    counts = str(case.images), str(case.messages)
    return case.id[:_SHOWN_DIGITS], one_line(case.label), *counts, f"{case.changed:%Y-%m-%d %H:%M}", signed


def _spell(moment: datetime) -> str:
    from edgemed.clinic.store.rows import spell_time

    return spell_time(moment)


@app.command("backup")
def backup_cases(
    target: BackupTarget,
    store: Store = None,
    passphrase_file: PassphraseFile = None,
    own_passphrase: OwnPassphrase = False,
    new_passphrase_file: NewPassphraseFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write an encrypted backup, one file, opened by the store's passphrase or one of its own."""
    out = Output(json=json, quiet=quiet)
    with open_store(store, passphrase_file, out) as cases:
        own = read_new_passphrase(new_passphrase_file, "The backup's passphrase", out) if own_passphrase or new_passphrase_file else None
        written = cases.backup(target, own)
    out.text(f"Backup: {written}")
    out.result({"backup": written, "size_bytes": written.stat().st_size})


@app.command("restore")
def restore_cases(
    backup: BackupFile, store: Store = None, passphrase_file: PassphraseFile = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Make a case store from a backup; only where there is none. The backup's passphrase becomes the store's."""
    from edgemed.clinic.store import CaseStore, harden_process
    from edgemed.clinic.store.backup import load_end
    from edgemed.clinic.store.layout import Layout

    out = Output(json=json, quiet=quiet)
    harden_process()
    path = store_file(store)
    Layout(path).require_absent()
    load_end(backup)
    passphrase = read_passphrase(passphrase_file, "The backup's passphrase: ", out)
    with CaseStore.restore(backup, passphrase, path, actor_name()) as cases:
        entries = cases.audit.verify()
        count = len(cases.list_cases(limit=-1))
    out.text(f"Restored {count} cases to {path}; {entries} entries of the audit log agree.")
    out.result({"store": path, "cases": count, "audit_entries": entries})


@app.command("passphrase")
def change_passphrase(
    store: Store = None,
    passphrase_file: PassphraseFile = None,
    new_passphrase_file: NewPassphraseFile = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Change the passphrase. Backups made before keep the one that they were made with."""
    from edgemed.clinic.store import CaseStore, harden_process
    from edgemed.clinic.store.layout import Layout

    out = Output(json=json, quiet=quiet)
    harden_process()
    path = store_file(store)
    Layout(path).require_present()
    old = read_passphrase(passphrase_file, "Present passphrase: ", out)
    with CaseStore.open(path, old, actor_name()) as cases:
        cases.change_passphrase(old, read_new_passphrase(new_passphrase_file, "New passphrase", out))
    out.text("The passphrase was changed.")
    out.result({"store": path, "changed": True})


@audit.command("verify")
def verify_audit(
    store: Store = None, head: Head = None, passphrase_file: PassphraseFile = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Check that no entry of the audit log, and no case, image, message or report that it speaks of, was changed or removed."""
    out = Output(json=json, quiet=quiet)
    with open_store(store, passphrase_file, out) as cases:
        entries = cases.audit.verify(head)
        number, digest = cases.audit.head()
    out.text(f"{entries} entries agree with each other and with the cases. Newest: {number}, {digest}")
    out.note("Note that number and hash outside this machine: --head finds a log that was written anew as a whole.")
    out.result({"entries": entries, "head": {"number": number, "hash": digest}})


@audit.command("show")
def show_audit(
    store: Store = None, last: Last = None, passphrase_file: PassphraseFile = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Show the audit log: who did what when, by ids and hashes."""
    out = Output(json=json, quiet=quiet)
    with open_store(store, passphrase_file, out) as cases:
        number, _ = cases.audit.head()
        entries = cases.audit.entries(1 if last is None else max(1, number - last + 1))
    out.table("", ("number", "at", "who", "what", "subject", "detail", "hash"), [_describe_entry(entry) for entry in entries])
    out.result({"entries": [_export_entry(entry) for entry in entries]})


def _describe_entry(entry: AuditEntry) -> tuple[str, ...]:
    from edgemed.core.text import one_line

    detail = ", ".join(f"{key} {value[:16]}" for key, value in entry.detail.items() if not key.startswith("record"))
    shown = (str(entry.number), f"{entry.at:%Y-%m-%d %H:%M:%S}", entry.actor, entry.action, entry.subject, detail, entry.hash[:16])
    return tuple(one_line(text) for text in shown)


def _export_entry(entry: AuditEntry) -> dict[str, Any]:
    """An entry with its time spelled as its hash covers it, so that the chain can be checked elsewhere."""
    from edgemed.clinic.store.rows import spell_time

    return asdict(entry) | {"at": spell_time(entry.at)}
