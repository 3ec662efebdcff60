"""`edgemed chat` on a terminal of its own that goes away, and told to end: what was typed is there afterwards."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from clinic_store import COST, PASSPHRASE

from edgemed.clinic.store import CaseStore, Means

ROOT = Path(__file__).resolve().parents[1]
_WAIT_S = 60.0

pytestmark = pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals and their signals are POSIX's")


class Chat:
    """The program on a pseudo-terminal."""

    def __init__(self, store: Path) -> None:
        import pty

        self.master, slave = pty.openpty()
        code = "import sys; from edgemed.cli import main; sys.argv = sys.argv[1:]; main()"
        command = [sys.executable, "-c", code, "edgemed", "chat", "--fake", "--language", "en", "--store", str(store)]
        env = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", "TMUX": "none"}
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *command], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=env, close_fds=True
        )
        os.close(slave)
        self.said = b""

    def wait(self, words: bytes) -> None:
        """Until the program has written `words` since it was last asked."""
        while words not in self.said:
            assert select.select([self.master], [], [], _WAIT_S)[0], self.said[-2000:]
            self.said += os.read(self.master, 65536)
        self.said = b""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def end(self) -> int:
        """Read on until the program has ended."""
        while self.process.poll() is None:
            if select.select([self.master], [], [], 0.1)[0]:
                try:
                    self.said += os.read(self.master, 65536)
                except OSError:
                    break
        return self.process.wait(_WAIT_S)


@pytest.mark.parametrize("how", ["hung up", "told to end"])
def test_what_was_typed_is_saved(tmp_path: Path, how: str) -> None:
    path = tmp_path / "cases.db"
    with CaseStore.create(path, PASSPHRASE, "x", Means(cost=COST)) as store:
        store.create_case("wrist")
    chat = Chat(path)
    chat.wait(b"Passphrase")
    chat.type(PASSPHRASE + "\r")
    chat.wait(b"wrist")
    chat.type("\r")
    chat.wait(b"Ask about the image")
    chat.type("\x14")
    chat.wait(b"No report yet")
    chat.type("broken radius")
    chat.wait(b"radius")
    if how == "hung up":
        os.close(chat.master)
        code = chat.process.wait(_WAIT_S)
        assert code == 128 + signal.SIGHUP
    else:
        chat.process.send_signal(signal.SIGTERM)
        assert chat.end() == 0
        os.close(chat.master)
    with CaseStore.open(path, PASSPHRASE, "x", Means(cost=COST)) as store:
        report = store.load_report(store.list_cases()[0].id)
        assert report is not None and report.findings == "broken radius" and report.edited
        assert store.audit.verify()
