"""How images are looked at, on its way into the store: one save after the other, however fast a series is leafed through.

    keeper = ViewKeeper(store.save_view)
    keeper.put(image_id, view)           # on the screen's thread; True: nobody is saving, so start `save_next` in threads until False
    keeper.save_next()                   # in a worker thread: the oldest wish; False where there is none
    keeper.rest()                        # for a lock: writes down what is left, or None

Of one image only the newest view is kept. Knows no screen.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from edgemed.clinic.records import View


class ViewKeeper:
    """Views that are to be saved."""

    def __init__(self, save: Callable[[str, View], None]) -> None:
        self._save = save
        self._lock = threading.Lock()
        self._views: dict[str, View] = {}
        self._saving = False

    def put(self, image_id: str, view: View) -> bool:
        """Wish for a save; whether somebody has to be told to do it."""
        with self._lock:
            self._views[image_id] = view
            idle, self._saving = not self._saving, True
            return idle

    def save_next(self) -> bool:
        """Save one, the oldest first; whether there was one. Raises StoreError."""
        with self._lock:
            if not self._views:
                self._saving = False
                return False
            image_id = next(iter(self._views))
            view = self._views.pop(image_id)
        try:
            self._save(image_id, view)
        except BaseException:
            with self._lock:
                self._saving = False
            raise
        return True

    def rest(self) -> Callable[[], None] | None:
        """What saves all that is left, to be called in a thread; None where nothing is."""
        if not self._views:
            return None

        def save() -> None:
            while self.save_next():
                pass

        return save
