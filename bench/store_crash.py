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
live     for information (`--live 100`): copied while the writer goes on, as `cp` or a synchronised folder does. That is no moment in time,
         and a copy that meets the moving of the log can be damaged: backups are made with `edgemed cases backup`. The log is moved as in
         real use here, at 64 MiB, after a deletion and when the store is locked.

Knows nothing of real disks' faults. The last line is JSON; exit code 1 where a kill or a copy was not good (live ones do not count).
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
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgemed.clinic.records import ImageFacts, Report
from edgemed.clinic.store import CaseStore, KdfCost, Means, database
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


def write_forever(path: Path, seed: int, log_bytes: int) -> None:
    """The writer's process."""
    database.LARGE_LOG_BYTES = log_bytes
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
        found = load_contents(store)
        lost = [f"deletion of case {case_id}" for case_id in self.gone if ("case", case_id) in found]
        for (what, subject), content in self.contents.items():
            case_id = subject.partition("/")[0]
            if ("case", case_id) not in found:
                lost += [] if case_id in self.doubtful else [f"case of {what} {subject}"]
            elif not _agrees(what, content, found.get((what, subject))):
                lost.append(f"{what} {subject}")
        return lost

    def settle(self, store: CaseStore) -> None:
        """After an opening nothing is doubtful any more."""
        there = {case.id for case in store.list_cases(limit=1_000_000)}
        self.contents = {key: content for key, content in self.contents.items() if key[1].partition("/")[0] in there}
        self.doubtful.clear()


def load_contents(store: CaseStore) -> dict[tuple[str, str], str]:
    """All that is in a store, as the writer's lines say it."""
    found: dict[tuple[str, str], str] = {}
    for case in store.list_cases(limit=1_000_000):
        found["case", case.id] = ""
        for message in store.list_messages(case.id):
            found["message", f"{case.id}/{message.id}"] = hashlib.sha256(message.text.encode()).hexdigest()
        for image in store.list_images(case.id):
            found["image", f"{case.id}/{image.id}"] = hashlib.sha256(store.read_image(image.id)).hexdigest()
        for report in store.list_reports(case.id):
            found["report", f"{case.id}/{report.version}"] = report.findings
            if report.signed_by:
                found["signed", f"{case.id}/{report.version}"] = report.findings
    return found


def _agrees(what: str, said: str, found: str | None) -> bool:
    if what == "report" and found is not None:
        return int(found.split()[1]) >= int(said.split()[1])  # a draft may have been saved once more
    return found == said


# ---------------------------------------------------------------- kills and copies


class Process:
    """The writer's process and its lines."""

    def __init__(self, path: Path, seed: int, log_bytes: int = LOG_BYTES) -> None:
        command = [sys.executable, "-m", "bench.store_crash", "--write", str(path), "--seed", str(seed), "--log-bytes", str(log_bytes)]
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
                if kind != "lying":
                    self.lost += [f"{where}: {what}" for what in expected.check(store)]
                    expected.settle(store)
            except EdgemedError as error:
                self.errors.append(f"{where}: {error}")

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


def run_copies(path: Path, copies: int, rng: random.Random, folder: Path, live: bool = False) -> Outcome:
    """Copy the files of a stopped writer again and again; `live`: of one that goes on while they are copied."""
    expected, outcome = Expected(), Outcome()
    process = Process(path, rng.randrange(1 << 30), database.LARGE_LOG_BYTES if live else LOG_BYTES)

    def listen() -> None:
        for line in process.lines():
            expected.hear(line)
            outcome.acknowledged += bool(line)

    for number in range(copies):
        target = folder / str(number) / path.name
        time.sleep(rng.uniform(0.01, 0.15))
        if not live:
            process.stop()
        listen()
        then = Expected(dict(expected.contents), set(expected.doubtful), set(expected.gone))
        kind = "live" if live else KINDS[number % len(KINDS)]
        kind = _copy(path, target, expected.last, kind, rng)
        if live:
            process.stop()
            listen()
            then.doubtful |= expected.doubtful  # deleted while it was copied
        outcome.check(target, then, kind)
        shutil.rmtree(target.parent)
        process.popen.send_signal(signal.SIGCONT)
    process.kill()
    process.close()
    return outcome


def _copy(path: Path, target: Path, last: dict[str, Any], kind: str, rng: random.Random) -> str:
    """Copy a stopped writer's files and damage the log as `kind` says, where a power cut could; what was done."""
    files, to = Layout(path), Layout(target)
    target.parent.mkdir(parents=True)
    moving = not last or path.stat().st_mtime_ns != last["main_ns"]  # the log is being moved into the main file, or was
    for old, new in ((files.db, to.db), (files.log, to.log), (files.key, to.key)):
        with suppress(FileNotFoundError):  # no log between two sessions
            shutil.copyfile(old, new)
    if kind == "live":
        return kind
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


def run(kills: int, copies: int, live: int = 0, seed: int = 0) -> dict[str, Outcome]:
    """All parts, each with a store of its own in a temporary folder."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores = {part: folder / part / "cases.db" for part in ("kills", "copies", "live")}
        for path in stores.values():
            CaseStore.create(path, PASSPHRASES[0], "bench", MEANS).close()
        outcomes = {"kills": run_kills(stores["kills"], kills, rng), "copies": run_copies(stores["copies"], copies, rng, folder / "torn")}
        return outcomes | ({"live": run_copies(stores["live"], live, rng, folder / "torn", live=True)} if live else {})


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.store_crash", description="SIGKILLs and power cuts of the case store.")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--copies", type=int, default=200)
    parser.add_argument("--live", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-bytes", type=int, default=LOG_BYTES, help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write is not None:
        write_forever(options.write, options.seed, options.log_bytes)
    results = run(options.kills, options.copies, options.live, options.seed)
    for part, outcome in results.items():
        print(f"{part}: {outcome}", file=sys.stderr)
    print(json.dumps({part: asdict(outcome) for part, outcome in results.items()}))
    sys.exit(0 if all(outcome.good for part, outcome in results.items() if part != "live") else 1)


if __name__ == "__main__":
    main()
