"""How the program locks, ends and breaks down: what was typed is kept, nothing of a patient stays in sight or is printed.

    class ChatApp(EndingApp): ...
    app.run(); app.finish()

Locking hides the screens at once and writes down behind the lock screen. The end comes by Ctrl+Q or SIGTERM (a machine that shuts down), by
SIGHUP (the terminal went away: no screen is drawn any more), or by a fault of ours.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.text import Text
from textual.css.query import NoMatches
from textual.worker import WorkerFailed

from edgemed.clinic.imaging import forget_frames
from edgemed.clinic.store import CaseStore
from edgemed.core.errors import EdgemedError
from edgemed.tui.bidi import BidiApp, forget_lines
from edgemed.tui.engines import EngineHolder
from edgemed.tui.i18n import _
from edgemed.tui.session import CaseSession

# An answer that is being written down when the program locks gets so long to end.
_END_S = 10.0
_LOOK_S = 0.05


class EndingApp(BidiApp[None]):
    """An app that holds a store, a session and an engine, and lets go of them."""

    engines: EngineHolder

    def __init__(self) -> None:
        super().__init__()
        self.session: CaseSession | None = None
        self._store: CaseStore | None = None
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="edgemed")
        # Questions that were typed and not sent, by case: kept when a case is left, never over a lock.
        self.drafts: dict[str, str] = {}
        self._locking = False
        self._ending = False
        # What was left to write down when the program broke down.
        self._last_work: Callable[[], None] | None = None

    @property
    def unlocked(self) -> bool:
        """Whether cases can be seen."""
        return self._store is not None and not self._store.locked

    def tell(self, error: EdgemedError) -> None:
        """Show an error for a while."""
        raise NotImplementedError

    def action_lock(self) -> None:
        """Hide everything now, then lock the store. Once: the clock and an impatient hand ask again while an answer is written down."""
        if self.unlocked and not self._locking and not self._ending:
            self._locking = True
            self.run_worker(self._lock(), group="lock")

    async def _lock(self) -> None:
        from edgemed.tui.screens.unlock import UnlockScreen

        close = self._closing_work()
        unsent, self.drafts = any(self.drafts.values()), {}
        cover = UnlockScreen(ready=False)
        try:
            with self.batch_update():
                self.clear_notifications()  # they name files and folders
                while len(self.screen_stack) > 2:
                    await self.pop_screen()
                await self.switch_screen(cover)
            await self._run_closing(close)
            if unsent:
                self.notify(_("A question that was not sent has not been kept."), timeout=10, markup=False)
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
            except EdgemedError:
                self.call_later(self.notify, _("What was typed last could not be saved."), severity="error", timeout=30, markup=False)
                raise
            finally:
                if store is not None:
                    store.lock()
                forget_frames()
                forget_lines()

        return close

    async def _in_thread(self, work: Callable[[], Any]) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pool, work)

    async def _run_closing(self, close: Callable[[], None]) -> None:
        try:
            await self._in_thread(close)
        except EdgemedError as error:
            self.tell(error)

    async def action_leave(self) -> None:
        """Write down, lock, end the engine, go."""
        if self._ending:
            return
        self._ending = True
        self.notify(_("Closing …"), timeout=4, markup=False)
        self.run_worker(self._leave(self._closing_work()), group="leave")

    async def _leave(self, close: Callable[[], None]) -> None:
        while self._locking:  # its answer and its texts first
            await asyncio.sleep(_LOOK_S)
        await self._run_closing(close)
        await self._in_thread(self.engines.close)
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
