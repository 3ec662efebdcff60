"""A case: its images, the image that is looked at, the conversation, and the line for the next question."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Footer, Static

from edgemed.clinic.records import Case, CaseImage
from edgemed.core.errors import EdgemedError, InputError
from edgemed.core.text import one_line
from edgemed.tui.attaching import Attached, attach_file
from edgemed.tui.drawing import PictureLike
from edgemed.tui.i18n import N_, _, ngettext
from edgemed.tui.keeping import ViewKeeper
from edgemed.tui.paths import FolderWatch
from edgemed.tui.screens.base import ChatScreen
from edgemed.tui.screens.folder import AttachingScreen, FolderScreen, Wanted
from edgemed.tui.session import Answered, CaseSession, Left, Piece, Said, SessionEvent
from edgemed.tui.stacks import place_stack, stack_of
from edgemed.tui.status import StatusBar
from edgemed.tui.texts import say_case, say_left_out, say_title
from edgemed.tui.viewer import ImageView
from edgemed.tui.viewgrid import MAX_VIEWS, ViewGrid
from edgemed.tui.widgets.conversation import Conversation, TextBuffer
from edgemed.tui.widgets.question import QuestionInput
from edgemed.tui.widgets.strip import ImageStrip

WATCH_S = 2.0
LAYOUTS = ("-both", "-image", "-talk")


class CaseScreen(ChatScreen):
    """One case."""

    DEFAULT_CSS = """
    CaseScreen #heading { color: $primary; text-style: bold; padding: 0 1; height: 1; text-wrap: nowrap; text-overflow: ellipsis; }
    CaseScreen #body { height: 1fr; }
    CaseScreen #left { width: 2fr; min-width: 30; }
    CaseScreen #right { width: 3fr; }
    CaseScreen ViewGrid { height: 1fr; }
    CaseScreen.-image #right { display: none; }
    CaseScreen.-talk #left { display: none; }
    CaseScreen #offer { height: 1; padding: 0 1; background: $selected; color: $foreground; display: none; }
    CaseScreen #offer.-shown { display: block; }
    """
    BINDINGS = [
        Binding("ctrl+o", "attach", N_("Attach")),
        Binding("ctrl+n", "accept", N_("Attach new file"), show=False),
        Binding("ctrl+r", "retry", N_("Retry")),
        Binding("ctrl+t", "report", N_("Report")),
        Binding("ctrl+g", "image", N_("Image")),
        Binding("f4", "beside", N_("Side by side"), show=False),
        Binding("f6", "layout", N_("Layout"), show=False),
        Binding("escape", "back", N_("Back")),
    ]

    class Happened(Message):
        """From the answering thread."""

        def __init__(self, event: SessionEvent) -> None:
            super().__init__()
            self.event = event

    def __init__(self, case_id: str) -> None:
        super().__init__()
        self.case_id = case_id
        self._buffer = TextBuffer()
        self._answering = False
        self._retry_wanted = False
        self._unsaid = ""
        self._side_by_side = False
        self._offered: Path | None = None
        self._keeper: ViewKeeper | None = None

    def compose(self) -> ComposeResult:
        yield Static("", id="heading", markup=False)
        with Horizontal(id="body"):
            with Vertical(id="left"):
                yield ImageStrip(id="images")
                yield ViewGrid(self.chat.graphics, id="view")
            with Vertical(id="right"):
                yield Conversation(self._buffer, id="talk")
        yield Static("", id="offer", markup=False)
        yield QuestionInput(placeholder=_("Ask about the image; Enter sends"), id="question", max_length=4000)
        yield StatusBar(markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.add_class(LAYOUTS[0])
        self.session = CaseSession(self.chat.store, self.chat.engines, self.case_id)
        self.chat.session = self.session
        self._keeper = ViewKeeper(self.chat.store.save_view)
        line = self.query_one("#question", QuestionInput)
        line.value = self.chat.drafts.get(self.case_id, "")
        line.focus()
        self.go(self._load())
        if self.chat.options.watch is not None:
            self.go(self._watch_folder(self.chat.options.watch), group="watch")

    def on_unmount(self) -> None:
        if self.chat.session is self.session:  # left by Escape; a lock has taken care of it already
            self.chat.session = None
        self.session.stop()

    # -- what is there ------------------------------------------------------------------------------------------------

    async def _load(self) -> None:
        await self._head()
        store = self.chat.store
        messages = await self.offload(store.list_messages, self.case_id)
        await self.query_one(Conversation).show(messages)
        self._offer_retry(bool(messages) and (messages[-1].role == "user" or messages[-1].state != "complete"))
        images = await self.offload(store.list_images, self.case_id)
        self.query_one(ImageStrip).fill(images, seen=[seen.image_id for message in messages for seen in message.images])

    async def _head(self) -> Case:
        case = await self.offload(self.chat.store.load_case, self.case_id)
        self.query_one("#heading", Static).update(say_case(case))
        return case

    @on(ImageStrip.Shown)
    def _show(self, event: ImageStrip.Shown) -> None:
        self.go(self._show_image(event.image), group="picture", exclusive=True)

    async def _show_image(self, image: CaseImage) -> None:
        """One image, or with F4 those that are asked about, side by side."""
        strip, grid = self.query_one(ImageStrip), self.query_one(ViewGrid)
        images = strip.asked[:MAX_VIEWS] if self._side_by_side and len(strip.asked) > 1 else (strip.shown_of(image),)
        stacks = [await self._open(one) for one in images]
        grid.set_preparation(self.chat.artifact.manifest.image if self.chat.artifact else None)
        titles = [f"{number} {say_title(one)}" if len(images) > 1 else "" for number, one in enumerate(images, 1)]
        # As they are looked at now, not before the files were opened: what is shown is what is asked about.
        now = [strip.shown_of(one) for one in images]
        grid.show([place_stack(s, strip.group_of(one.id), one, title) for s, one, title in zip(stacks, now, titles, strict=True)])

    async def _open(self, image: CaseImage) -> dict[str, PictureLike]:
        """The image and the others of its series, by their ids; only the image itself is opened now."""
        stack = stack_of(self.query_one(ImageStrip).group_of(image.id), self.session.picture)
        await self.offload(stack[image.id].load)
        return {image_id: self.chat.guard.watch(picture) for image_id, picture in stack.items()}

    def action_beside(self) -> None:
        """The images that are asked about side by side, or one alone."""
        strip = self.query_one(ImageStrip)
        if len(strip.asked) < 2 and not self._side_by_side:
            self.chat.say(_("Mark two to four images with Space in the list of images first."))
            return
        self._side_by_side = not self._side_by_side
        if strip.current is not None:
            self.go(self._show_image(strip.current), group="picture", exclusive=True)

    @on(ImageView.ViewChanged)
    def _look(self, event: ImageView.ViewChanged) -> None:
        self.query_one(ImageStrip).keep_view(event.key, event.view)
        if self._keeper is not None and self._keeper.put(event.key, event.view):
            # The program's own work, which goes on when this screen is left.
            self.app.run_worker(self._caught(self._keep_views(self._keeper)), group="views")

    async def _keep_views(self, keeper: ViewKeeper) -> None:
        while await self.offload(keeper.save_next):
            pass

    def unsaved(self) -> Callable[[], None] | None:
        """What a lock is to write down first."""
        return self._keeper.rest() if self._keeper is not None else None

    @on(QuestionInput.Changed, "#question")
    def _keep_draft(self, event: QuestionInput.Changed) -> None:
        self.chat.drafts[self.case_id] = event.value

    # -- asking -------------------------------------------------------------------------------------------------------

    @on(QuestionInput.Submitted)
    def _submitted(self, event: QuestionInput.Submitted) -> None:
        question = event.value.strip()
        if not question:
            return
        if self._answering:
            self.chat.say(_("The answer before is still coming. Escape stops it."))
            return
        event.input.value = ""
        self._unsaid = question
        images = self.query_one(ImageStrip).asked
        self._answer(lambda: self.session.ask(question, images, self._sink))

    def action_retry(self) -> None:
        """Ask the last question again."""
        if not self._answering:
            images = self.query_one(ImageStrip).asked
            self._answer(lambda: self.session.retry(images, self._sink))

    def _answer(self, work: Callable[[], Answered]) -> None:
        self._set_answering(True)
        self.go(self._answer_now(work), group="answer")

    async def _answer_now(self, work: Callable[[], Answered]) -> None:
        talk = self.query_one(Conversation)
        await talk.begin()
        try:
            await self.offload(work)
        except EdgemedError:
            await talk.end(None)
            if not self._unsaid:
                self._offer_retry(True)  # the question was recorded, its answer could not be
            self._give_back()
            raise
        finally:
            self._set_answering(False)
        await self._head()

    def _give_back(self) -> None:
        """A question that could not even be recorded returns to the line it was typed into."""
        line = self.query_one("#question", QuestionInput)
        if self._unsaid and not line.value:
            line.value = self._unsaid
        self._unsaid = ""

    def _offer_retry(self, wanted: bool) -> None:
        self._retry_wanted = wanted
        self.refresh_bindings()

    def _sink(self, event: SessionEvent) -> None:
        """In the answering thread: text goes into the buffer, the rest to the screen as a message."""
        if isinstance(event, Piece):
            self._buffer.push(event.text)  # the screen may be gone by now: a lock does not wait
        else:
            self.post_message(self.Happened(event))

    async def on_case_screen_happened(self, message: Happened) -> None:
        if not self.shown:
            return
        talk, event = self.query_one(Conversation), message.event
        if isinstance(event, Said):
            self._unsaid = ""
            await talk.add(event.message)
        elif isinstance(event, Left):
            text = ngettext(
                "The conversation is longer than the model can hold: the oldest question and its answer were not shown to it.",
                "The conversation is longer than the model can hold: the oldest {count} questions and answers were not shown to it.",
                event.exchanges,
            )
            self.chat.say(text.format(count=event.exchanges))
        elif isinstance(event, Answered):
            await talk.end(event)
            self._offer_retry(event.message.state != "complete")

    def _set_answering(self, answering: bool) -> None:
        self._answering = answering
        for bar in self.query(StatusBar):  # none, where the screen is on its way out
            bar.state = replace(bar.state, answering=answering)
            bar.ask_engine()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Retry is offered where there is something to retry."""
        return self._retry_wanted if action == "retry" else super().check_action(action, parameters)

    def action_back(self) -> None:
        """Stop the answer; else back to the question, and from there to the list."""
        if self._answering:
            self.session.stop()
        elif not self.query_one("#question").has_focus and not self.has_class("-image"):
            self.query_one("#question").focus()
        elif self.has_class("-image"):
            self.action_layout()
            self.query_one("#question").focus()
        else:
            self.app.pop_screen()

    # -- images -------------------------------------------------------------------------------------------------------

    def action_image(self) -> None:
        """To the image's keys, and back."""
        view = self.query_one(ViewGrid).active
        (self.query_one("#question") if view.has_focus else view).focus()

    def action_layout(self) -> None:
        """Image and conversation, image alone, conversation alone."""
        now = next(index for index, name in enumerate(LAYOUTS) if self.has_class(name))
        self.remove_class(LAYOUTS[now])
        self.add_class(LAYOUTS[(now + 1) % len(LAYOUTS)])

    def action_attach(self) -> None:
        """Choose a file."""
        self.go(self._choose())

    async def _choose(self) -> None:
        from edgemed.tui.screens.attach import AttachScreen

        wanted = await self.app.push_screen_wait(AttachScreen(self.chat.options.watch))
        await self._take(wanted)

    async def _take(self, wanted: Wanted | None) -> None:
        """Attach what was chosen."""
        if isinstance(wanted, Path):
            await self._take_file(wanted)
        elif wanted is not None:
            attached = await self.app.push_screen_wait(AttachingScreen(self.case_id, wanted))
            if attached is not None:
                await self._show_attached(attached)

    async def _take_file(self, path: Path) -> None:
        self.chat.say(_("Opening {name} …").format(name=one_line(path.name)))
        await self._show_attached(await self.offload(attach_file, self.chat.store, self.case_id, path))

    async def _show_attached(self, attached: Attached) -> None:
        self.query_one(ImageStrip).fill(await self.offload(self.chat.store.list_images, self.case_id), show=attached.image.id)
        await self._head()
        if left_out := say_left_out(attached):
            self.chat.say(left_out)
        await self._warn(attached)

    async def _warn(self, attached: Attached) -> None:
        from edgemed.tui.dialogs import ConfirmDialog

        if attached.other_patient:
            title = _("Another patient?")
            text = _("This image names another patient than the images before it. Check that it belongs to this case.")
            await self.app.push_screen_wait(ConfirmDialog(title, text, _("I have checked")))
        if attached.warnings:
            text = "\n".join((*attached.warnings, _("Black out what names the patient before you ask.")))
            if await self.app.push_screen_wait(ConfirmDialog(_("Look at this image first"), text, _("Mask text"))):
                view = self.query_one(ViewGrid).active
                view.focus()
                view.action_masks()

    @on(QuestionInput.PathPasted)
    def _pasted(self, event: QuestionInput.PathPasted) -> None:
        self.go(self._take_pasted(event))

    async def _take_pasted(self, event: QuestionInput.PathPasted) -> None:
        if await self.offload(event.path.is_file):
            await self._take_file(event.path)
        elif await self.offload(event.path.is_dir):
            wanted = await self.app.push_screen_wait(FolderScreen(event.path))
            await self._take(wanted)
        else:
            event.question.put_text(event.text)

    # -- a watched folder ---------------------------------------------------------------------------------------------

    async def _watch_folder(self, folder: Path) -> None:
        self._folder = await self.offload(FolderWatch, folder)
        self._waiting: list[Path] = []
        self.set_interval(WATCH_S, lambda: self.go(self._look_for_files(), group="poll", exclusive=True))
        await self._look_for_files()

    async def _look_for_files(self) -> None:
        self._waiting += await self.offload(self._folder.poll)
        if self._offered is None and self._waiting:
            self._offered = self._waiting.pop(0)
        self._show_offer()

    def _show_offer(self) -> None:
        bar = self.query_one("#offer", Static)
        bar.set_class(self._offered is not None, "-shown")
        if self._offered is not None:
            bar.update(_("New file: {name}. Ctrl+N attaches it.").format(name=one_line(self._offered.name)))

    def action_accept(self) -> None:
        """Attach the file that is offered."""
        path, self._offered = self._offered, None
        self._show_offer()
        if path is not None:
            self.go(self._take_file(path))

    # -- the report ---------------------------------------------------------------------------------------------------

    def action_report(self) -> None:
        """The case's report."""
        from edgemed.tui.screens.report import ReportScreen

        if self._answering:
            self.chat.tell(InputError("Expected the answer to have ended, found it still coming.", "Stop it with Escape, or wait."))
            return
        self.app.push_screen(ReportScreen(self.session))

    def on_screen_resume(self) -> None:
        if self.is_mounted and self.chat.unlocked:
            self.go(self._head())
