"""The conversation: questions, answers as they stream, and under each answer how sure it is and that it advises only.

    conversation.show(messages)                  # all at once
    conversation.begin(); conversation.grow(); conversation.end(answered)

Text arrives in a buffer from another thread (`push`) and reaches the screen at most REPAINTS_PER_S times a second, however fast it comes,
so that keys are never kept waiting. Texts are Content, never markup.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.widgets import Static

from edgemed.clinic.records import Message
from edgemed.core.text import printable
from edgemed.tui.i18n import _, language
from edgemed.tui.session import Answered
from edgemed.tui.texts import advice, refer, say_error, say_model, say_state, say_sureness, say_text, say_time

REPAINTS_PER_S = 20
# Older ones are in the record, and told of; a screen with thousands of lines is slow.
SHOWN = 200


class TextBuffer:
    """Text on its way from the answering thread to the screen."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pieces: list[str] = []

    def push(self, text: str) -> None:
        """From any thread."""
        with self._lock:
            self._pieces.append(text)

    def take(self) -> str:
        """What came since the last time."""
        with self._lock:
            text, self._pieces = "".join(self._pieces), []
            return text


class Entry(Static):
    """One message, or a note between messages."""

    DEFAULT_CSS = """
    Entry { height: auto; margin: 0 0 1 0; padding: 0 1; }
    Entry.-user { background: $panel; }
    Entry.-note { color: $quiet; }
    Entry.-refer { border-left: thick $error; }
    Entry.-rtl { text-align: right; }
    """

    def __init__(self, content: Content, classes: str) -> None:
        super().__init__(content, classes=f"{classes} -rtl" if language().right_to_left else classes)


class Conversation(VerticalScroll):
    """All entries of a case, the newest at the bottom and in sight."""

    DEFAULT_CSS = "Conversation { height: 1fr; scrollbar-size-vertical: 1; }"

    def __init__(self, buffer: TextBuffer, id: str | None = None) -> None:
        super().__init__(id=id)
        self.buffer = buffer
        # How often the growing answer was drawn: tests hold it against the number of tokens.
        self.repaints = 0
        self._text = ""
        self._growing: Entry | None = None

    def compose(self) -> ComposeResult:
        yield Entry(Content(_("Attach an image, then ask about it.")), "-note -empty")

    def on_mount(self) -> None:
        self.anchor()
        self.set_interval(1 / REPAINTS_PER_S, self.grow)

    async def show(self, messages: Sequence[Message]) -> None:
        """Replace everything."""
        self._growing = None
        await self.query(Entry).remove()
        if not messages:
            await self.mount(Entry(Content(_("Attach an image, then ask about it.")), "-note -empty"))
        if len(messages) > SHOWN:
            await self.mount(Entry(Content(_("Earlier messages are kept in the case and not shown here.")), "-note"))
        await self.mount_all(_entry_of(message) for message in messages[-SHOWN:])

    async def add(self, message: Message) -> None:
        """One more message, above the answer that is coming: words of it may be here already."""
        await self.query(".-empty").remove()
        await self.mount(_entry_of(message), before=self._growing)

    async def note(self, text: str) -> None:
        """A line that is not part of the record."""
        await self.mount(Entry(Content(text), "-note"))

    async def begin(self) -> None:
        """An answer is coming."""
        self._text = ""
        self.buffer.take()
        self._growing = Entry(Content(_("Looking and thinking …")), "-assistant")
        await self.mount(self._growing)

    def grow(self) -> None:
        """Draw what came since the last time."""
        if self._growing is None:
            return
        if text := self.buffer.take():
            self._text += text
            self.repaints += 1
            self._growing.update(Content(printable(self._text)))

    async def end(self, answered: Answered | None) -> None:
        """The answer as it was recorded takes the place of the growing one."""
        growing, self._growing = self._growing, None
        self.buffer.take()
        if growing is not None:
            await growing.remove()
        if answered is not None:
            await self.mount(_entry_of(answered.message, answered))


def _entry_of(message: Message, answered: Answered | None = None) -> Entry:
    if message.role == "user":
        return Entry(_question(message), "-user")
    return Entry(_answer(message, answered), f"-assistant -{message.verdict}")


def _question(message: Message) -> Content:
    head = _("You, {time}").format(time=say_time(message.created))
    return Content.assemble((head, "$quiet"), "\n", say_text(message))


def _answer(message: Message, answered: Answered | None) -> Content:
    """What was answered, what is to be known of it, and the advice."""
    lines: list[Content] = [Content.styled(f"{say_model(message.model)}, {say_time(message.created)}", "$quiet")]
    if message.verdict == "refer":
        lines.append(Content.styled(refer(), "bold $error"))
    if message.text:
        lines.append(Content(say_text(message)))
    if message.state != "complete":
        lines.append(Content.styled(say_state(message), "bold $warning"))
    if answered is not None and answered.error is not None:
        lines.append(Content.styled(say_error(answered.error), "$error"))
        lines.append(Content.styled(_("Press Ctrl+R to ask again."), "$quiet"))
    if answered is not None and answered.cut:
        lines.append(Content.styled(_("The answer reached its longest length and ends here."), "$warning"))
    if message.text:
        lines.append(Content.styled(say_sureness(message), "$quiet"))
        lines.append(Content.styled(advice(), "italic $quiet"))
    return Content("\n").join(lines)
