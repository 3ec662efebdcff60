"""A counter that shows that the screen never waits for the engine, the store or an image: their calls are counted by thread.

    guard = CallGuard(strict=True)       # tests: a call on the screen's thread raises
    guard.bind()                         # on the screen's thread, once
    store = guard.watch(store)           # the same object, seen through the guard
    guard.calls, guard.screen_calls      # 341, 0

Counts calls, not time: a machine's load cannot change what it says. Attributes that are no functions are read freely.
"""

from __future__ import annotations

import functools
import threading
from typing import Any, TypeVar, cast

T = TypeVar("T")


class ScreenBlockedError(AssertionError):
    """A fault of ours: something slow was called on the screen's thread."""


class CallGuard:
    """Counts calls of watched objects, and those of them that were made on the screen's thread."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict
        self.calls = 0
        self.screen_calls = 0
        self._screen: int | None = None
        self._lock = threading.Lock()

    def bind(self) -> None:
        """This thread is the screen's."""
        self._screen = threading.get_ident()

    def watch(self, target: T) -> T:
        """`target` behind the guard."""
        return cast(T, _Watched(target, self))

    def note(self, what: str) -> None:
        """A call of something slow begins. Raises ScreenBlockedError on the screen's thread, where strict."""
        on_screen = threading.get_ident() == self._screen
        with self._lock:
            self.calls += 1
            self.screen_calls += on_screen
        if on_screen and self.strict:
            raise ScreenBlockedError(f"{what} was called on the screen's thread")


class _Watched:
    """Stands for another object: its functions are noted, its values handed through."""

    def __init__(self, target: Any, guard: CallGuard) -> None:
        self._target, self._guard = target, guard

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._target, name)
        if not callable(value):
            return value
        what = f"{type(self._target).__name__}.{name}"

        @functools.wraps(value)
        def noted(*arguments: Any, **options: Any) -> Any:
            self._guard.note(what)
            return value(*arguments, **options)

        return noted
