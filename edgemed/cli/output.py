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
