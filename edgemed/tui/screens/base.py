"""What all screens have: the program, slow work in threads with errors shown, keys in the user's language."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.css.query import NoMatches
from textual.screen import ModalScreen, Screen

from edgemed.core.errors import EdgemedError, ResourceError
from edgemed.tui.i18n import localise_bindings

if TYPE_CHECKING:
    from edgemed.tui.app import ChatApp

P = ParamSpec("P")
R = TypeVar("R")
Result = TypeVar("Result")


class Working:
    """Mixed into screens."""

    @property
    def chat(self) -> ChatApp:
        """The program."""
        return cast("ChatApp", cast(Screen[Any], self).app)

    async def offload(self, work: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Run something slow in a thread."""
        return await self.chat.offload(work, *arguments, **options)

    def go(self, work: Coroutine[Any, Any, Any], group: str = "work", exclusive: bool = False) -> None:
        """Start work that ends by itself; an error of ours is shown."""
        cast(Screen[Any], self).run_worker(self._caught(work), group=group, exclusive=exclusive)

    async def _caught(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            await work
        except EdgemedError as error:
            self.failed(error)
        except MemoryError:  # an image that this machine cannot hold; the rest of the program can go on
            self.failed(ResourceError("The machine has too little memory for this.", "Close other programs, or attach a smaller image."))
        except NoMatches:
            if self.shown:
                raise

    @property
    def shown(self) -> bool:
        """Whether this screen is still there: a lock takes it away under work and messages that are on their way, part by part."""
        return cast(Screen[Any], self) in self.chat.screen_stack

    def failed(self, error: EdgemedError) -> None:
        """How this screen shows an error."""
        self.chat.tell(error)


class ChatScreen(Working, Screen[None]):
    """A screen that fills the terminal."""

    def on_mount(self) -> None:
        localise_bindings(self)


class Dialog(Working, ModalScreen[Result]):
    """A box over a screen; Escape closes it without a result."""

    DEFAULT_CSS = """
    Dialog { align: center middle; background: $cover; }
    Dialog > .box { width: 70; max-width: 96%; height: auto; max-height: 96%; border: round $primary; background: $surface; padding: 0 1; }
    Dialog .title { text-style: bold; color: $primary; width: 1fr; }
    Dialog .text { width: 1fr; }
    Dialog .quiet { color: $quiet; width: 1fr; }
    Dialog .problem { color: $error; width: 1fr; display: none; }
    Dialog .problem.-shown { display: block; }
    Dialog .buttons { height: auto; width: 1fr; align-horizontal: right; margin-top: 1; }
    Dialog .buttons Button { margin-left: 1; }
    """
    BINDINGS = [("escape", "cancel", "")]

    def on_mount(self) -> None:
        localise_bindings(self)

    def action_cancel(self) -> None:
        """Close without a result."""
        self.dismiss(None)

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield from self.compose_box()

    def compose_box(self) -> ComposeResult:
        """The box's content."""
        yield from ()
