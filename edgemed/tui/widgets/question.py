"""The line that questions are typed into. A file that is dropped onto the terminal arrives as a pasted path and is offered as an image;
of any other text all lines are taken, joined by spaces."""

from __future__ import annotations

from pathlib import Path

from textual import events
from textual.message import Message
from textual.widgets import Input

from edgemed.tui.paths import parse_pasted


class QuestionInput(Input):
    """An input that looks at what is pasted."""

    DEFAULT_CSS = """
    QuestionInput { border: none; border-top: solid $primary; height: 2; padding: 0 1; background: $background; }
    QuestionInput:focus { border: none; border-top: solid $accent; background-tint: $foreground 0%; }
    """

    class PathPasted(Message):
        """Text that looks like a path was pasted: if there is no such file, it is text after all (`put_text`)."""

        def __init__(self, question: QuestionInput, path: Path, text: str) -> None:
            super().__init__()
            self.question, self.path, self.text = question, path, text

    def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()  # Input's own handler would drop all lines but the first
        path = parse_pasted(event.text)
        if path is None:
            self.put_text(event.text)
        else:
            self.post_message(self.PathPasted(self, path, event.text))

    def put_text(self, text: str) -> None:
        """Put pasted text in, in place of what is selected."""
        line = " ".join(part for part in (line.strip() for line in text.splitlines()) if part)
        self.replace(line, *sorted(self.selection))
