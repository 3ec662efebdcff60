"""The line that questions are typed into. A file that is dropped onto the terminal arrives as a pasted path and is offered as an image."""

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
        path = parse_pasted(event.text)
        if path is None:
            return  # Textual calls Input's own handler next
        event.stop()
        event.prevent_default()
        self.post_message(self.PathPasted(self, path, event.text))

    def put_text(self, text: str) -> None:
        """Put pasted text in after all."""
        lines = text.splitlines()
        if lines:
            self.insert_text_at_cursor(lines[0])
