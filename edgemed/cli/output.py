"""The one sink for everything a command says: data on stdout, the rest on stderr; for people, as JSON, or quiet.

    out = Output(json=True)
    out.note("Converting …")            # stderr, unless quiet
    out.text("answer")                  # stdout, for people
    out.result({"answer": "…"})         # stdout's last line, with --json

rich is imported when a table or a bar is drawn, so that --help stays quick. Knows no command and no model.
"""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from edgemed.core.advice import ADVICE as ADVICE
from edgemed.core.text import printable

Progress = Callable[[str, int, int], None]
Steps = Callable[[int, int, str], None]


def escape_controls(line: str) -> str:
    """JSON that a terminal may be given: what steers one, and JSON does not escape by itself, as \\u escapes. The same value."""
    return line if line.isprintable() else "".join(c if printable(c) == c else f"\\u{ord(c):04x}" for c in line)


@dataclass(frozen=True)
class Output:
    """How one command speaks. With `json`, stdout holds one JSON document and nothing else; `quiet` silences notes and bars."""

    json: bool = False
    quiet: bool = False

    def text(self, text: str, end: str = "\n") -> None:
        """Data for a person, on stdout. What a model wrote cannot steer the terminal."""
        if not self.json:
            print(printable(text), end=end, flush=True)

    def note(self, text: str) -> None:
        """What is going on, on stderr."""
        if not self.quiet:
            print(printable(text), file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        """What a person should know, on stderr, also when quiet."""
        print(f"Warning: {printable(text)}", file=sys.stderr, flush=True)

    def advise(self) -> None:
        """The note under every answer, on stderr, also when quiet."""
        print(ADVICE, file=sys.stderr, flush=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table for a person, on stdout."""
        if not self.json:
            from edgemed.report.tables import print_table

            print_table(title, columns, rows)

    def result(self, data: dict[str, Any]) -> None:
        """The command's result as one JSON line, with --json."""
        if self.json:
            line = escape_controls(jsonlib.dumps(data, ensure_ascii=False, default=str))
            try:
                line.encode(sys.stdout.encoding or "utf-8")
            except UnicodeEncodeError:
                line = jsonlib.dumps(data, default=str)  # escapes can say what stdout cannot
            print(line, flush=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A callback (what, done, total) that draws one bar a thing on stderr; without a terminal or when quiet, nothing."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda what, done, total: None
            return
        from edgemed.report.tables import progress_bars

        with progress_bars() as show:
            yield show

    @contextmanager
    def steps(self) -> Iterator[Steps]:
        """A callback (step, steps, text) for something long: a bar on a terminal, else a note every twentieth of the way."""
        if self.quiet:
            yield lambda step, steps, text: None
        elif sys.stderr.isatty():
            from edgemed.report.tables import step_bar

            with step_bar() as show:
                yield show
        else:
            yield self._note_step

    def _note_step(self, step: int, steps: int, text: str) -> None:
        if step == 1 or step == steps or step * 20 // steps != (step - 1) * 20 // steps:
            self.note(f"{step}/{steps} {text}")
