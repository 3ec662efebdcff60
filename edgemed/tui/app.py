"""`edgemed chat`'s program: what is open, what is locked, and which screen stands in front.

    app = build_app(models, store_path, actor="nurse")          # tests: FakeModels, a store of their own, a clock
    app.run()

The screen's thread draws and nothing else: the store, the engine and images are called in threads of `offload`, which app.guard counts.
Locking lets go of everything that was shown; what was typed into a report is saved first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar, cast

from textual import events
from textual.binding import Binding
from textual.filter import LineFilter

from edgemed.clinic.store import CaseStore
from edgemed.clinic.store.access import awake_and_asleep_s
from edgemed.core.errors import EdgemedError, StoreError
from edgemed.core.manifest import Artifact
from edgemed.tui.ending import EndingApp
from edgemed.tui.engines import EngineHolder
from edgemed.tui.guard import CallGuard
from edgemed.tui.i18n import N_, choose_language, localise_bindings, set_language
from edgemed.tui.models import Models
from edgemed.tui.safe import ControlFilter
from edgemed.tui.status import ModelState, StatusBar
from edgemed.tui.terminal import SETTINGS, Graphics, Kind, detect_graphics
from edgemed.tui.texts import say_error
from edgemed.tui.themes import DEFAULT_THEME, all_themes, default_variables, textual_name
from runtimes.consult import Answering

P = ParamSpec("P")
R = TypeVar("R")

LOCK_AFTER_S = 300
_IDLE_CHECK_S = 1.0


@dataclass(frozen=True)
class ChatOptions:
    """What the command line said; empty: the user's settings, then the defaults."""

    language: str = ""
    theme: str = ""
    watch: Path | None = None


class ChatApp(EndingApp):
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
        self.lock_after_s = LOCK_AFTER_S
        self.engines = EngineHolder(self._open_engine, self._engine_changed)
        self._stores = guard.watch(stores)
        self._clock, self._active_at = clock, clock()
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
