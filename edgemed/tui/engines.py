"""The engine as the program holds it: opened once in the background, waited for by whoever asks, closed at the end.

    holder = EngineHolder(open_engine)        # open_engine(note) -> Answering
    holder.start()                            # returns at once
    holder.get()                              # waits; raises what opening raised
    holder.state                              # "none", "loading", "ready" or "failed"

Knows no screen. `get` and `stats` are for worker threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Literal

from edgemed.core.errors import EdgemedError, EngineError
from runtimes.consult import Answering
from runtimes.messages import EngineStats

OpenEngine = Callable[[Callable[[str], None]], Answering]
State = Literal["none", "loading", "ready", "failed"]


class EngineHolder:
    """One engine, or why there is none. `changed` is called from the loading thread at every change of state."""

    def __init__(self, open_engine: OpenEngine, changed: Callable[[], None] = lambda: None) -> None:
        self._open, self._changed = open_engine, changed
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._engine: Answering | None = None
        self._closed = False
        self.error: EdgemedError | None = None
        self.note = ""
        self.state: State = "none"

    def start(self) -> None:
        """Begin to open, unless that was done already and did not fail."""
        with self._lock:
            if self.state in ("loading", "ready") or self._closed:
                return
            self.state, self.error = "loading", None
            self._done.clear()
        threading.Thread(target=self._load, name="edgemed-load", daemon=True).start()
        self._changed()

    def _load(self) -> None:
        engine: Answering | None = None
        error: EdgemedError = EngineError("Loading the model ended unforeseen.", "Start the program again; see: edgemed verify")
        try:
            engine = self._open(self._say)
        except EdgemedError as raised:
            error = raised
        except MemoryError:
            error = EngineError("The machine has too little memory for this model.", "Close other programs.")
        finally:  # whatever happens, nobody waits for ever
            self._settle(engine, None if engine else error)

    def _settle(self, engine: Answering | None, error: EdgemedError | None) -> None:
        with self._lock:
            self._engine, self.error, self.state = engine, error, "ready" if engine else "failed"
            closed = self._closed
        self._done.set()
        if closed and engine is not None:
            engine.close()
        self._changed()

    def _say(self, text: str) -> None:
        self.note = text
        self._changed()

    @property
    def ready(self) -> Answering | None:
        """The engine, if it is there now."""
        return self._engine

    def get(self) -> Answering:
        """The engine, waited for; one that failed to open is tried anew. Raises EdgemedError."""
        self.start()
        self._done.wait()
        if self._engine is None:
            raise self.error or EngineError("The engine is closed.", "Start the program again.")
        return self._engine

    def stats(self) -> EngineStats | None:
        """A snapshot of a loaded engine. Raises EngineError where it died and did not come back."""
        engine = self._engine
        return engine.stats() if engine is not None else None

    def close(self) -> None:
        """End the engine; one that is loading ends as soon as it has loaded."""
        with self._lock:
            self._closed = True
            engine, self._engine = self._engine, None
            self._done.set()
        if engine is not None:
            engine.close()
