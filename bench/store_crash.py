"""The case store under SIGKILL and under power cuts: does it open, is what was acknowledged there, does the audit log verify?

    python -m bench.store_crash --kills 50 --copies 200
    python -m bench.store_crash --kills 3 --copies 8 --seed 1        # what the tests run

A writer in a process of its own adds and deletes cases, images and messages, saves and signs reports, changes the passphrase, locks and
unlocks, and prints a line after each call that returned. It moves the log into the main file after each MiB, so that this is hit, too.

kills    SIGKILL at a random moment, opening included; the next writer goes on with the same store.
copies   the writer is stopped at a random moment, as by a power cut, and the main file, the log and the key file are copied:
         "whole" as they are; "cut" and "noise": what was written to the log since the last call that returned is cut at a random place or
         overwritten, as unsynced writes may be (not while the log is moved into the main file: it was synced before that);
         "lying": the log is cut anywhere, as by a disk that says synced and is not: then the newest changes are lost, the rest must stand.

Knows nothing of real disks' faults. The last line is JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgemed.clinic.records import ImageFacts, Report
from edgemed.clinic.store import CaseStore, KdfCost, Means
from edgemed.clinic.store.layout import Layout
from edgemed.core.errors import EdgemedError, PassphraseError

PASSPHRASES = ("the first passphrase", "the second passphrase")
MEANS = Means(cost=KdfCost(64, 1, 1))
LOG_BYTES = 1 << 20
KINDS = ("whole", "cut", "noise", "lying")


def open_store(path: Path) -> tuple[CaseStore, int]:
    """Open with whichever passphrase is the present one; which it was."""
    try:
        return CaseStore.open(path, PASSPHRASES[0], "bench", MEANS), 0
    except PassphraseError:
        return CaseStore.open(path, PASSPHRASES[1], "bench", MEANS), 1


# ---------------------------------------------------------------- the writer


class Writer:
    """Changes a store without end and says what returned."""

    def __init__(self, path: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.path = path
        self.store, self.which = open_store(path)
        self.cases = [case.id for case in self.store.list_cases()]
        self.calls = 0

    def say(self, what: str, subject: str, content: str = "") -> None:
        """One line, in one write."""
        log = Layout(self.path).log
        log_bytes = log.stat().st_size if log.exists() else 0
        line = {"what": what, "id": subject, "content": content, "log_bytes": log_bytes, "main_ns": self.path.stat().st_mtime_ns}
        os.write(1, json.dumps(line).encode() + b"\n")

    def step(self) -> None:
        """One random change."""
        self.calls += 1
        if len(self.cases) < 3 or self.rng.random() < 0.05:
            self.cases.append(self.store.create_case(f"case {self.calls}").id)
            self.say("case", self.cases[-1])
            return
        steps = (self.message, self.image, self.report, self.sign, self.delete, self.passphrase, self.lock)
        self.rng.choices(steps, (40, 20, 15, 5, 3, 2, 2))[0](self.rng.choice(self.cases))

    def message(self, case_id: str) -> None:
        text = f"message {self.calls} " + "word " * self.rng.randrange(200)
        message = self.store.add_message(case_id, "user", text)
        self.say("message", f"{case_id}/{message.id}", hashlib.sha256(text.encode()).hexdigest())

    def image(self, case_id: str) -> None:
        data = self.rng.randbytes(self.rng.choice((100, 5_000, 60_000, 400_000)))
        image = self.store.add_image(case_id, "x.png", data, ImageFacts("plain", 1, 1))
        self.say("image", f"{case_id}/{image.id}", hashlib.sha256(data).hexdigest())

    def report(self, case_id: str) -> None:
        newest = self.store.load_report(case_id)
        saved = self.store.save_report(Report(case_id, newest.version if newest else 1, findings=f"draft {time.monotonic_ns()}"))
        self.say("report", f"{case_id}/{saved.version}", saved.findings)

    def sign(self, case_id: str) -> None:
        newest = self.store.load_report(case_id)
        if newest is not None and not newest.signed_by:
            signed = self.store.sign_report(case_id, "Dr. Bench")
            self.say("signed", f"{case_id}/{signed.version}", signed.findings)

    def delete(self, case_id: str) -> None:
        self.say("deleting", case_id)
        self.store.delete_case(case_id)
        self.cases.remove(case_id)
        self.say("deleted", case_id)

    def passphrase(self, _: str) -> None:
        old, self.which = self.which, 1 - self.which
        self.store.change_passphrase(PASSPHRASES[old], PASSPHRASES[self.which])
        self.say("passphrase", str(self.which))

    def lock(self, _: str) -> None:
        self.store.lock()
        self.store.unlock(PASSPHRASES[self.which])
        self.say("unlocked", "")


def write_forever(path: Path, seed: int) -> None:
    """The writer's process."""
    from edgemed.clinic.store import database

    database.LARGE_LOG_BYTES = LOG_BYTES
    os.write(1, b"{}\n")
    writer = Writer(path, seed)
    while True:
        writer.step()


# ---------------------------------------------------------------- what must be there


@dataclass
class Expected:
    """What was acknowledged. A case whose deletion was begun may be there or not."""

    contents: dict[tuple[str, str], str] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)
    last: dict[str, Any] = field(default_factory=dict)

    def hear(self, line: dict[str, Any]) -> None:
        """Take in one line of the writer."""
        if not line:
            return
        what, subject = line["what"], line["id"]
        self.last = line
        if what in ("deleting", "deleted"):
            self.doubtful.add(subject)
            self.gone |= {subject} if what == "deleted" else set()
        elif what in ("case", "message", "image", "report", "signed"):
            self.contents[what, subject] = line["content"]

    def check(self, store: CaseStore) -> list[str]:
        """What was acknowledged and is not there."""
        there = {case.id for case in store.list_cases(limit=1_000_000)}
        lost = [f"deletion of case {case_id}" for case_id in self.gone & there]
        for (what, subject), content in self.contents.items():
            case_id, _, part = subject.partition("/")
            if case_id not in there:
                lost += [] if case_id in self.doubtful else [f"case of {what} {subject}"]
            elif not _holds(store, what, case_id, part, content):
                lost.append(f"{what} {subject}")
        return lost

    def settle(self, store: CaseStore) -> None:
        """After an opening nothing is doubtful any more."""
        there = {case.id for case in store.list_cases(limit=1_000_000)}
        self.contents = {key: content for key, content in self.contents.items() if key[1].partition("/")[0] in there}
        self.doubtful.clear()


def _holds(store: CaseStore, what: str, case_id: str, part: str, content: str) -> bool:
    if what == "case":
        return True
    if what == "message":
        return content in [hashlib.sha256(m.text.encode()).hexdigest() for m in store.list_messages(case_id) if m.id == part]
    if what == "image":
        return hashlib.sha256(store.read_image(part)).hexdigest() == content
    report = next((r for r in store.list_reports(case_id) if str(r.version) == part), None)
    if report is None:
        return False
    if what == "signed":
        return report.findings == content and bool(report.signed_by)
    return int(report.findings.split()[1]) >= int(content.split()[1])  # a draft may have been saved once more


# ---------------------------------------------------------------- kills and copies


class Process:
    """The writer's process and its lines."""

    def __init__(self, path: Path, seed: int) -> None:
        command = [sys.executable, "-m", "bench.store_crash", "--write", str(path), "--seed", str(seed)]
        self.popen = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1])
        assert self.popen.stdout is not None
        self.out = self.popen.stdout
        self.out.readline()  # it has imported what it needs
        os.set_blocking(self.out.fileno(), False)
        self.rest = b""

    def lines(self) -> list[dict[str, Any]]:
        """Lines that were written whole since the last call."""
        while piece := self.out.read():
            self.rest += piece
        *whole, self.rest = self.rest.split(b"\n")
        return [json.loads(line) for line in whole]

    def stop(self) -> None:
        """Stop, and wait until it is stopped."""
        self.popen.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.popen.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the writer ended by itself: {status}"

    def kill(self) -> None:
        self.popen.kill()
        if self.popen.wait() != -signal.SIGKILL:
            raise AssertionError(f"the writer ended by itself: {self.popen.returncode}")

    def close(self) -> None:
        self.out.close()


@dataclass
class Outcome:
    """What came of one part of the bench."""

    tried: int = 0
    opened: int = 0
    verified: int = 0
    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    audit_entries: int = 0

    def check(self, path: Path, expected: Expected, kind: str) -> None:
        """Open, verify, compare."""
        self.tried += 1
        self.kinds[kind] = self.kinds.get(kind, 0) + 1
        where = f"{kind} {self.tried}"
        try:
            store, _ = open_store(path)
        except EdgemedError as error:
            self.errors.append(f"{where} does not open: {error}")
            return
        self.opened += 1
        with store:
            try:
                self.audit_entries = store.audit.verify()
                self.verified += 1
            except EdgemedError as error:
                self.errors.append(f"{where}: {error}")
            if kind != "lying":
                self.lost += [f"{where}: {what}" for what in expected.check(store)]
                expected.settle(store)

    @property
    def good(self) -> bool:
        return self.tried == self.opened == self.verified and not self.lost and not self.errors


def run_kills(path: Path, kills: int, rng: random.Random) -> Outcome:
    """Kill a writer again and again."""
    expected, outcome = Expected(), Outcome()
    for _ in range(kills):
        process = Process(path, rng.randrange(1 << 30))
        time.sleep(rng.uniform(0, 0.6))
        process.kill()
        for line in process.lines():
            expected.hear(line)
            outcome.acknowledged += bool(line)
        process.close()
        outcome.check(path, expected, "kill")
    return outcome


def run_copies(path: Path, copies: int, rng: random.Random, folder: Path) -> Outcome:
    """Copy the files of a stopped writer again and again."""
    expected, outcome = Expected(), Outcome()
    process = Process(path, rng.randrange(1 << 30))
    for number in range(copies):
        time.sleep(rng.uniform(0.01, 0.15))
        process.stop()
        for line in process.lines():
            expected.hear(line)
            outcome.acknowledged += bool(line)
        target = folder / str(number) / path.name
        kind = _copy(path, target, expected.last, KINDS[number % len(KINDS)], rng)
        process.popen.send_signal(signal.SIGCONT)
        outcome.check(target, Expected(dict(expected.contents), set(expected.doubtful), set(expected.gone)), kind)
        shutil.rmtree(target.parent)
    process.kill()
    process.close()
    return outcome


def _copy(path: Path, target: Path, last: dict[str, Any], kind: str, rng: random.Random) -> str:
    """Copy a stopped writer's files and damage the log as `kind` says, where a power cut could; what was done."""
    files, to = Layout(path), Layout(target)
    target.parent.mkdir(parents=True)
    moving = not last or path.stat().st_mtime_ns != last["main_ns"]  # the log is being moved into the main file, or was
    for old, new in ((files.db, to.db), (files.log, to.log), (files.key, to.key)):
        if old.exists():
            shutil.copyfile(old, new)
    if kind == "whole" or moving or not to.log.exists():
        return "whole, log moving" if moving else "whole"
    size = to.log.stat().st_size
    start = 0 if kind == "lying" else min(size, int(last["log_bytes"]))
    place = rng.randint(start, size)
    if kind == "noise":
        with to.log.open("r+b") as f:
            f.seek(place)
            f.write(rng.randbytes(size - place))
    else:
        os.truncate(to.log, place)
    return kind


def run(kills: int, copies: int, seed: int = 0) -> dict[str, Outcome]:
    """Both, each with a store of its own in a temporary folder."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores = folder / "kills" / "cases.db", folder / "copies" / "cases.db"
        for path in stores:
            CaseStore.create(path, PASSPHRASES[0], "bench", MEANS).close()
        return {"kills": run_kills(stores[0], kills, rng), "copies": run_copies(stores[1], copies, rng, folder / "torn")}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.store_crash", description="SIGKILLs and power cuts of the case store.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        write_forever(options.write, options.seed)
    results = run(options.kills, options.copies, options.seed)
    for part, outcome in results.items():
        print(f"{part}: {outcome}", file=sys.stderr)
    print(json.dumps({part: asdict(outcome) for part, outcome in results.items()}))
    sys.exit(0 if all(outcome.good for outcome in results.values()) else 1)


if __name__ == "__main__":
    main()
