"""`edgemed chat`'s program: what is open, what is locked, and which screen stands in front.

    app = build_app(models, store_path, actor="nurse")          # tests: FakeModels, a store of their own, a clock
    app.run()

The screen's thread draws and nothing else: the store, the engine and images are called in threads of `offload`, which app.guard counts.
Locking lets go of everything that was shown; what was typed into a report is saved first.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from rich.text import Text
from textual import events
from textual.binding import Binding
from textual.css.query import NoMatches
from textual.filter import LineFilter
from textual.worker import WorkerFailed

from edgemed.clinic.imaging import forget_frames
from edgemed.clinic.store import CaseStore
from edgemed.clinic.store.access import awake_and_asleep_s
from edgemed.core.errors import EdgemedError, StoreError
from edgemed.core.manifest import Artifact
from edgemed.tui.bidi import BidiApp, forget_lines
from edgemed.tui.engines import EngineHolder
from edgemed.tui.guard import CallGuard
from edgemed.tui.i18n import N_, _, choose_language, localise_bindings, set_language
from edgemed.tui.models import Models
from edgemed.tui.safe import ControlFilter
from edgemed.tui.session import CaseSession
from edgemed.tui.status import ModelState, StatusBar
from edgemed.tui.terminal import SETTINGS, Graphics, Kind, detect_graphics
from edgemed.tui.texts import say_error
from edgemed.tui.themes import DEFAULT_THEME, all_themes, default_variables, textual_name
from runtimes.consult import Answering

P = ParamSpec("P")
R = TypeVar("R")

LOCK_AFTER_S = 300
_IDLE_CHECK_S = 1.0
_LOOK_S = 0.05
# An answer that is being written down when the program locks gets so long to end.
_END_S = 10.0


@dataclass(frozen=True)
class ChatOptions:
    """What the command line said; empty: the user's settings, then the defaults."""

    language: str = ""
    theme: str = ""
    watch: Path | None = None


class ChatApp(BidiApp[None]):
    """The program. Use `build_app`."""

    TITLE = "edgemed"
    CSS = """
    Input > .input--placeholder, TextArea > .text-area--placeholder { color: $quiet; }
    DataTable > .datatable--cursor, OptionList > .option-list--option-highlighted { background: $selected; color: $foreground; }
    DataTable:focus > .datatable--cursor, OptionList:focus > .option-list--option-highlighted { background: $selected; color: $foreground; }
    ToggleButton > .toggle--button { color: $quiet; background: $quiet; }
    ToggleButton.-on > .toggle--button { color: $background; background: $success; }
    .-theme-edgemed-contrast Button { border: round $foreground; }
    ToastRack { dock: top; align: right top; }
    * { scrollbar-size-vertical: 1; scrollbar-color: $quiet; scrollbar-background: $background; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS = [
        Binding("f1", "help", N_("Help")),
        Binding("f3", "model", N_("Model"), show=False),
        Binding("ctrl+l", "lock", N_("Lock"), priority=True),
        Binding("ctrl+q", "leave", N_("Quit"), priority=True),
    ]

    def __init__(
        self,
        models: Models,
        store_path: Path,
        actor: str,
        options: ChatOptions,
        stores: type[CaseStore],
        guard: CallGuard,
        clock: Callable[[], float],
        graphics: Graphics,
    ) -> None:
        super().__init__()
        self.models, self.store_path, self.actor, self.options = guard.watch(models), store_path, actor, options
        self.guard, self.graphics, self.graphics_setting = guard, graphics, "auto"
        self._found_graphics = graphics
        self.artifact: Artifact | None = None
        self.session: CaseSession | None = None
        self.lock_after_s = LOCK_AFTER_S
        self.engines = EngineHolder(self._open_engine, self._engine_changed)
        self._stores = guard.watch(stores)
        self._store: CaseStore | None = None
        self._clock, self._active_at = clock, clock()
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="edgemed")
        self._ending = False
        self._locking = False
        # What was left to write down when the program broke down.
        self._last_work: Callable[[], None] | None = None

    _controls = ControlFilter()

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [*super().get_line_filters(), self._controls]

    def get_theme_variable_defaults(self) -> dict[str, str]:
        """Colours that the style sheets name and that are not Textual's own."""
        return default_variables()

    # -- what is open -------------------------------------------------------------------------------------------------

    @property
    def store(self) -> CaseStore:
        """The unlocked store. Raises StoreError."""
        if self._store is None or self._store.locked:
            raise StoreError("The case store is locked.", "Enter the passphrase.")
        return self._store

    @property
    def unlocked(self) -> bool:
        """Whether cases can be seen."""
        return self._store is not None and not self._store.locked

    async def offload(self, work: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Run something slow in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *arguments, **options))

    def tell(self, error: EdgemedError) -> None:
        """Show an error for a while."""
        self.notify(say_error(error), severity="error", timeout=10, markup=False)

    def say(self, text: str) -> None:
        """Show a note for a while."""
        self.notify(text, timeout=4, markup=False)

    def create_store(self, passphrase: str) -> None:
        """Make the store (thread). Raises StoreError, PassphraseError."""
        self._store = self.guard.watch(self._stores.create(self.store_path, passphrase, self.actor))

    def unlock_store(self, passphrase: str) -> None:
        """Open or unlock the store (thread). Raises StoreError, PassphraseError."""
        if self._store is None:
            self._store = self.guard.watch(self._stores.open(self.store_path, passphrase, self.actor))
        else:
            self._store.unlock(passphrase)

    # -- beginning ----------------------------------------------------------------------------------------------------

    def on_mount(self) -> None:
        self.guard.bind()
        for theme in all_themes():
            self.register_theme(theme)
        self.theme = textual_name(self.options.theme or DEFAULT_THEME)
        set_language(choose_language(self.options.language or None))
        localise_bindings(self)
        self.set_interval(_IDLE_CHECK_S, self._lock_if_idle)
        self._heed_signals()
        self.run_worker(self._begin())

    async def _begin(self) -> None:
        from edgemed.tui.screens.unlock import UnlockScreen
        from edgemed.tui.screens.welcome import WelcomeScreen

        exists = await self.offload(self.store_path.exists)
        await self.push_screen(UnlockScreen() if exists else WelcomeScreen())
        if exists:  # the first run's screen looks for the model itself
            await self.find_model()

    async def find_model(self) -> None:
        """Look for the model and begin to load it."""
        try:
            self.artifact = await self.offload(self.models.find)
        except EdgemedError as error:
            self.tell(error)
        if self.artifact is not None:
            self.engines.start()
        self._engine_changed()

    def use_model(self, artifact: Artifact) -> None:
        """A model that was made just now."""
        self.artifact = artifact
        self.engines.start()

    def enter(self) -> None:
        """The store is open: take the user's settings and show the cases."""
        # The program's own work: the screen that asks for it is taken away, and its work with it.
        self.run_worker(self._enter(), group="enter", exclusive=True)

    async def _enter(self) -> None:
        from edgemed.tui.screens.cases import CaseListScreen
        from edgemed.tui.screens.model import ModelScreen

        self._active_at = self._clock()
        try:
            await self.take_settings()
        except EdgemedError as error:
            self.tell(error)
        if self._locking or self._ending or not self.unlocked:
            return
        await self.switch_screen(CaseListScreen())
        if self.artifact is None:
            await self.push_screen(ModelScreen())

    async def take_settings(self, chosen: bool = False) -> None:
        """Language, look and auto-lock as kept in the store; at the start the command line's word is stronger, later what was `chosen`."""
        kept = await self.offload(self._read_settings)
        set_language(choose_language(None if chosen else self.options.language or None, kept["language"]))
        localise_bindings(self)
        if kept["theme"] and (chosen or not self.options.theme):
            self.theme = textual_name(kept["theme"])
        seconds = kept["lock_after_s"]
        self.lock_after_s = int(seconds) if seconds.isdecimal() and int(seconds) > 0 else LOCK_AFTER_S
        self.graphics_setting = kept["graphics"] if kept["graphics"] in SETTINGS else "auto"
        self.graphics = self._found_graphics
        if self.graphics_setting != "auto":
            self.graphics = replace(self._found_graphics, kind=cast(Kind, self.graphics_setting))

    def _read_settings(self) -> dict[str, str]:
        return {key: self.store.get_setting(key) or "" for key in ("language", "theme", "graphics", "lock_after_s")}

    # -- the engine ---------------------------------------------------------------------------------------------------

    def _open_engine(self, note: Callable[[str], None]) -> Answering:
        if self.artifact is None:
            raise StoreError("Expected a model, found none on this machine.", "Press F3 to make one.")
        return self.guard.watch(self.models.open(self.artifact, note))

    def _engine_changed(self) -> None:
        """From any thread."""
        state = ModelState.of(self.artifact, self.engines)
        if self._thread_id and self.is_running:
            self.call_later(self._show_state, state)

    def _show_state(self, state: ModelState) -> None:
        for screen in self.screen_stack:
            for bar in screen.query(StatusBar):
                bar.state = state

    # -- locking and leaving ------------------------------------------------------------------------------------------

    async def on_event(self, event: events.Event) -> None:
        if isinstance(event, events.Key | events.MouseEvent | events.Paste):
            self._active_at = self._clock()
        await super().on_event(event)

    def _lock_if_idle(self) -> None:
        if self.unlocked and self._clock() - self._active_at >= self.lock_after_s:
            self.action_lock()

    def action_lock(self) -> None:
        """Hide everything now, then lock the store. Once: the clock and an impatient hand ask again while an answer is written down."""
        if self.unlocked and not self._locking and not self._ending:
            self._locking = True
            self.run_worker(self._lock(), group="lock")

    async def _lock(self) -> None:
        from edgemed.tui.screens.unlock import UnlockScreen

        close = self._closing_work()
        cover = UnlockScreen(ready=False)
        try:
            with self.batch_update():
                self.clear_notifications()  # they name files and folders
                while len(self.screen_stack) > 2:
                    await self.pop_screen()
                await self.switch_screen(cover)
            await self._run_closing(close)
        finally:
            self._locking = False
        cover.ready = True

    def _closing_work(self) -> Callable[[], None]:
        """What is to be written down before the store closes, taken from the screens now and run in a thread."""
        saves = [save for screen in self.screen_stack if (save := getattr(screen, "unsaved", lambda: None)()) is not None]
        session, store = self.session, self._store
        self.session = None

        def close() -> None:
            if session is not None:
                session.stop()
                session.wait(_END_S)
                session.forget()
            try:
                for save in saves:
                    save()
            finally:
                if store is not None:
                    store.lock()
                forget_frames()
                forget_lines()

        return close

    async def _run_closing(self, close: Callable[[], None]) -> None:
        try:
            await self.offload(close)
        except EdgemedError as error:
            self.tell(error)

    async def action_leave(self) -> None:
        """Write down, lock, end the engine, go."""
        if self._ending:
            return
        self._ending = True
        self.say(_("Closing …"))
        self.run_worker(self._leave(self._closing_work()), group="leave")

    async def _leave(self, close: Callable[[], None]) -> None:
        while self._locking:  # its answer and its texts first
            await asyncio.sleep(_LOOK_S)
        await self._run_closing(close)
        await self.offload(self.engines.close)
        self.exit()

    def _heed_signals(self) -> None:
        """A machine that shuts down, or a connection that broke off, takes nothing with it that was typed."""
        loop = asyncio.get_running_loop()
        with suppress(NotImplementedError, RuntimeError, ValueError):  # Windows has no such signals, and only a main thread hears them
            loop.add_signal_handler(signal.SIGTERM, lambda: self.call_later(self.action_leave))
            loop.add_signal_handler(signal.SIGHUP, self._hung_up)

    def _hung_up(self) -> None:
        """The terminal is gone: whatever is drawn now waits for ever, so the end comes without the screens."""
        if not self._ending:
            self._ending = True
            threading.Thread(target=self._end_at_once, args=(self._closing_work(),), name="edgemed-end").start()

    def _end_at_once(self, close: Callable[[], None]) -> None:
        try:
            for _ in range(round(_END_S / _LOOK_S)):
                if not self._locking:
                    break
                time.sleep(_LOOK_S)
            with suppress(EdgemedError):  # there is nobody to tell
                close()
            self.engines.close()
        finally:
            os._exit(128 + signal.SIGHUP)

    def finish(self) -> None:
        """After `run`, however it ended: what was typed is saved, the store locked, the engine ended. Raises StoreError, ResourceError."""
        store = self._store
        work = self._last_work or (lambda: store.lock() if store is not None else None)
        try:
            self._pool.submit(work).result()
        finally:
            self._pool.submit(self.engines.close).result()

    def _fatal_error(self) -> None:
        """A fault of ours. Textual would print the values of all variables: a patient's, or the passphrase."""
        with suppress(NoMatches, EdgemedError):
            self._last_work = self._closing_work()
        self.panic(Text(describe_fault(self._exception)))

    # -- screens over others ------------------------------------------------------------------------------------------

    def action_help(self) -> None:
        """Show the keys."""
        from edgemed.tui.screens.help import HelpScreen

        if not isinstance(self.screen, HelpScreen):
            self.push_screen(HelpScreen())

    def action_model(self) -> None:
        """Show the model, and what fits this machine."""
        from edgemed.tui.screens.model import ModelScreen

        if self.unlocked and not isinstance(self.screen, ModelScreen):
            self.push_screen(ModelScreen())


def build_app(
    models: Models,
    store_path: Path,
    actor: str,
    options: ChatOptions | None = None,
    *,
    stores: type[CaseStore] = CaseStore,
    guard: CallGuard | None = None,
    clock: Callable[[], float] = awake_and_asleep_s,
    graphics: Graphics | None = None,
) -> ChatApp:
    """The program over a way to a model and a place for the store. Opens nothing yet.

    `graphics`: how images are drawn; where left out the terminal is asked now, before the program owns it.
    """
    return ChatApp(models, store_path, actor, options or ChatOptions(), stores, guard or CallGuard(), clock, graphics or detect_graphics())


def describe_fault(error: BaseException | None) -> str:
    """Where the program broke down, without a word of what it was working on; all of it under EDGEMED_DEBUG=1."""
    if isinstance(error, WorkerFailed):
        error = error.error
    if error is None or os.environ.get("EDGEMED_DEBUG") == "1":
        return "".join(traceback.format_exception(error)) if error else "Error: the program broke down."
    at = traceback.extract_tb(error.__traceback__)[-1:]
    where = f" at {Path(at[0].filename).name}:{at[0].lineno}" if at else ""
    hint = "Hint: Run it again with EDGEMED_DEBUG=1, on no patient's case."
    return f"Error: something unforeseen happened ({type(error).__name__}{where}).\n{hint}"
