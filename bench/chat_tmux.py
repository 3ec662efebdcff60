"""The real program in a real terminal, from an empty folder to a signed export: `python -m bench.chat_tmux`.

    python -m bench.chat_tmux --model DIR          # or EDGEMED_HOME with edgemed-demo converted at 4 bits in it
    python -m bench.chat_tmux --fake               # without a model
    python -m bench.chat_tmux --save docs/screens  # keeps four of its screens as SVG

tmux is the terminal: keys go in by `send-keys`, files by a bracketed paste, and what is checked is what stands on the pane. New store, new
case, the bundled radiograph and a DICOM file, three questions, stop and retry, report, signature, five exports, lock, wrong and right
passphrase, quit, open again; then the exports and the audit log are read. Measures nothing: it is there to fail. The last line of stdout
is JSON. Needs tmux (`apt install tmux`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from edgemed.core.errors import EngineError, ResourceError
from edgemed.core.text import printable

ROOT = Path(__file__).resolve().parents[1]
RADIOGRAPH = ROOT / "edgemed/demo/radiograph.jpg"
PASSPHRASE = "a-long-enough-passphrase"
QUESTIONS = ("What modality is used to take this image?", "Is this a study of the chest?", "Is there an abnormality in this image?")
COLUMNS, ROWS = 100, 30
# A model on two slow cores answers within this; a program that hangs does not.
PATIENCE_S = 180.0
_POLL_S = 0.1
# As long as a person takes to go from one line to the next.
_BREATH_S = 0.5
_KEY_S = 0.15


@dataclass
class Terminal:
    """A tmux server of its own with one pane."""

    command: str
    environment: dict[str, str]
    socket: str = f"edgemed-{os.getpid()}"
    checks: list[str] = field(default_factory=list)

    def tmux(self, *arguments: str, text: str | None = None) -> str:
        """One tmux command. Raises ResourceError where tmux refuses."""
        done = subprocess.run(["tmux", "-L", self.socket, *arguments], input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ResourceError(f"Expected tmux to {arguments[0]}, found: {printable(done.stderr.strip())}.", "Check the installed tmux.")
        return done.stdout

    def start(self) -> None:
        """Run the program. The pane stays when it ends, so that its last words can be read."""
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.environment.items())
        shell = f"env {variables} {self.command}; echo ENDED $?; sleep 3600"
        self.tmux("-f", "/dev/null", "new-session", "-d", "-x", str(COLUMNS), "-y", str(ROWS), shell)

    def stop(self) -> None:
        """End tmux and what runs in it."""
        subprocess.run(["tmux", "-L", self.socket, "kill-server"], capture_output=True, check=False)

    def pane(self) -> str:
        """The screen's text."""
        return self.tmux("capture-pane", "-p")

    def keys(self, *keys: str) -> None:
        """Press keys, named as tmux names them, one after the other as a hand does: a key that moves the focus comes to its end first."""
        for key in keys:
            self.tmux("send-keys", key)
            time.sleep(_KEY_S)

    def type(self, text: str) -> None:
        """Type characters."""
        self.tmux("send-keys", "-l", text)

    def paste(self, text: str) -> None:
        """Paste as a terminal does with a dropped file."""
        self.tmux("load-buffer", "-", text=text)
        self.tmux("paste-buffer", "-p")

    def wait(self, words: str, absent: bool = False) -> str:
        """Wait until words stand on the pane (or no longer do), and note it. Raises EngineError with the last screen."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            pane = self.pane()
            if (words in pane) != absent:
                self.checks.append(f"{'no longer' if absent else 'seen'}: {words}")
                return pane
            time.sleep(_POLL_S)
        where = "gone from" if absent else "on"
        raise EngineError(f"Expected '{words}' {where} the screen, found:\n{self.pane()}", "Look at the screen above.")

    def save(self, target: Path) -> None:
        """The screen with its colours, as SVG."""
        from rich.console import Console
        from rich.text import Text

        coloured = self.tmux("capture-pane", "-e", "-p", "-N")
        console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
        console.print(Text.from_ansi(coloured.rstrip("\n")), no_wrap=True, crop=True)  # in one piece: colours go on from line to line
        target.write_text(console.export_svg(title="edgemed chat"), encoding="utf-8")


def run_story(terminal: Terminal, folder: Path, dicom: Path, screens: Path | None) -> None:
    """The whole way, once."""

    def shot(name: str) -> None:
        if screens is not None:
            time.sleep(2 * _BREATH_S)  # a drawing on its way
            terminal.save(screens / f"{name}.svg")

    first_run(terminal)
    shot("cases")
    new_case(terminal)
    for number, question in enumerate(QUESTIONS, 1):
        ask(terminal, question, number)
    shot("case")
    attach_dicom(terminal, dicom)
    shot("dicom")
    export(terminal, folder / "out")
    shot("report")
    lock_and_reopen(terminal)
    terminal.keys("C-q")
    terminal.wait("ENDED 0")


def first_run(terminal: Terminal) -> None:
    """Passphrase twice."""
    terminal.wait("Welcome to edgemed")
    terminal.wait("Model: ")
    for _ in range(2):
        terminal.type(PASSPHRASE)
        terminal.keys("Enter")
        time.sleep(_BREATH_S)
    terminal.wait("No cases yet")


def new_case(terminal: Terminal) -> None:
    """A case with the bundled radiograph."""
    terminal.keys("n")
    terminal.wait("A short name of your own")
    terminal.type("chest, cough")
    terminal.keys("Enter")
    terminal.wait("chest, cough · 0 images")
    terminal.paste(str(RADIOGRAPH))
    terminal.wait("1 image ")
    terminal.wait("512 × 512")


def attach_dicom(terminal: Terminal, dicom: Path) -> None:
    """A second image, as DICOM, with its window."""
    terminal.paste(str(dicom))
    terminal.wait("2 images")
    terminal.wait("CR CHEST PA")
    terminal.wait("Window")
    time.sleep(_BREATH_S)
    if "Look at this image first" in terminal.pane():
        terminal.keys("Escape")


def ask(terminal: Terminal, question: str, number: int) -> None:
    """One question and its answer."""
    terminal.type(question)
    terminal.keys("Enter")
    terminal.wait(f"{2 * number} messages")
    terminal.wait("never replaces a clinician")


def export(terminal: Terminal, out: Path) -> None:
    """Draft, edit, sign, export."""
    out.mkdir()
    terminal.keys("C-t")
    terminal.wait("No report yet")
    terminal.keys("F5")
    terminal.wait("drafted by")
    terminal.type("Read by a person. ")
    terminal.keys("F9")
    terminal.wait("Your name and role")
    terminal.type("Dr A. Reader")
    terminal.keys("Enter")
    terminal.wait("signed by Dr A. Reader")
    terminal.keys("F8")
    terminal.wait("Export the report")
    terminal.keys("C-a", "C-k")
    terminal.type(str(out))
    for _ in range(3):
        terminal.keys("Tab")
    for _ in range(3):  # FHIR, DICOM and the structured report as well
        terminal.keys("Space", "Tab")
    terminal.keys("Tab", "Tab", "Enter")
    terminal.wait("Written to")


def lock_and_reopen(terminal: Terminal) -> None:
    """Lock, a wrong passphrase, the right one, the case again."""
    terminal.keys("C-l")
    terminal.wait("edgemed is locked")
    terminal.wait("chest, cough", absent=True)
    terminal.type("not-the-passphrase")
    terminal.keys("Enter")
    terminal.wait("wrong")
    unlock(terminal)


def unlock(terminal: Terminal) -> None:
    """The right passphrase, and the case as it was left."""
    terminal.type(PASSPHRASE)
    terminal.keys("Enter")
    terminal.wait("signed")
    time.sleep(_BREATH_S)
    terminal.keys("Enter")
    terminal.wait(QUESTIONS[-1])


def check_exports(out: Path) -> dict[str, int]:
    """Sizes by name. Raises EngineError where a file is missing, unsigned, or holds what was typed nowhere."""
    found = {path.name: path.stat().st_size for path in sorted(out.iterdir())}
    if len(found) != 5 or not all("signed" in name for name in found):
        raise EngineError(f"Expected five signed exports in {out}, found {sorted(found)}.", "Look at the report's screen.")
    markdown = next(out.glob("*.md")).read_text(encoding="utf-8")
    for words in ("Read by a person.", "Dr A. Reader", QUESTIONS[0]):
        if words not in markdown:
            raise EngineError(f"Expected '{words}' in the Markdown export, found none.", "Look at the file.")
    return found


def read_audit(store: Path, passphrase_file: Path) -> str:
    """`edgemed audit verify` on the store. Raises EngineError where it does not verify."""
    command = [sys.executable, "-m", "edgemed", "audit", "verify", "--store", str(store), "--passphrase-file", str(passphrase_file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"Expected the audit log to verify, found: {done.stderr.strip()}", "Look at the store.")
    return done.stdout.strip().splitlines()[-1]


def make_dicom(folder: Path) -> Path:
    """The radiograph as a DICOM file that names nobody."""
    import numpy as np
    from PIL import Image
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    pixels = np.asarray(Image.open(RADIOGRAPH).convert("L"), np.uint16) * 16
    data = Dataset()
    data.SOPClassUID, data.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.Modality, data.BodyPartExamined, data.ViewPosition = "CR", "CHEST", "PA"
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.WindowCenter, data.WindowWidth = 2048, 4096
    data.BurnedInAnnotation = "NO"
    data.PixelData = pixels.tobytes()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    path = folder / "prior.dcm"
    data.save_as(path, enforce_file_format=True)
    return path


def main(arguments: list[str] | None = None) -> int:
    """The story in a folder of its own, which goes at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="", help="a converted model's folder")
    parser.add_argument("--fake", action="store_true", help="without a model")
    parser.add_argument("--save", type=Path, default=None, help="folder for four screens as SVG")
    wish = parser.parse_args(arguments)
    if shutil.which("tmux") is None:
        raise ResourceError("Expected tmux, found none.", "Run: apt install tmux")
    with tempfile.TemporaryDirectory(prefix="edgemed-chat-") as name:
        folder = Path(name)
        passphrase_file = folder / "passphrase"
        passphrase_file.write_text(PASSPHRASE)
        passphrase_file.chmod(0o600)
        result = run_in(folder, wish, passphrase_file)
    print(json.dumps(result))
    return 0


def run_in(folder: Path, wish: argparse.Namespace, passphrase_file: Path) -> dict[str, object]:
    """Run the story and read what it left."""
    store = folder / "cases" / "cases.db"
    options = ["--language", "en", "--store", str(store), *(["--fake"] if wish.fake else []), *([wish.model] if wish.model else [])]
    command = " ".join(map(shlex.quote, [sys.executable, "-m", "edgemed", "chat", *options]))
    environment = {"PYTHONPATH": str(ROOT), "TERM": "tmux-256color", "COLORTERM": "truecolor"}
    if os.environ.get("EDGEMED_HOME"):
        environment["EDGEMED_HOME"] = os.environ["EDGEMED_HOME"]
    if wish.save is not None:
        wish.save.mkdir(parents=True, exist_ok=True)
    terminal = Terminal(command, environment)
    try:
        terminal.start()
        run_story(terminal, folder, make_dicom(folder), wish.save)
    finally:
        terminal.stop()
    exports = check_exports(folder / "out")
    audit = read_audit(store, passphrase_file)
    return {"model": wish.model or ("fake" if wish.fake else "edgemed-demo"), "checks": terminal.checks, "exports": exports, "audit": audit}


if __name__ == "__main__":
    sys.exit(main())
