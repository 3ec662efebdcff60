"""One to four images side by side: current beside prior, or the views of a study.

    grid = ViewGrid(graphics, preparation=...)
    grid.show([Shown(picture, view, key="…", title=_("Current")), Shown(prior, title=_("Prior"))])

Each is an ImageView with keys and messages of its own; Tab and a click go from one to the next. With `linked`, zoom, pan and frame
steps in one are repeated in the others (l switches it). Where a grid is narrow, two images stand one above the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Grid

from edgemed.clinic.records import Box, View
from edgemed.core.images import ImagePreparation
from edgemed.tui.drawing import PictureLike
from edgemed.tui.i18n import N_, localise_bindings
from edgemed.tui.terminal import Graphics
from edgemed.tui.viewer import ImageView

MAX_VIEWS = 4
# Narrower than this, half the width shows nothing of a radiograph.
SIDE_BY_SIDE_COLUMNS = 60


@dataclass(frozen=True)
class Stack:
    """The pictures of a series, what each is called, its masks, and which of them is shown: see ImageView.show_series."""

    pictures: tuple[PictureLike, ...]
    keys: tuple[str, ...]
    position: int
    masks: tuple[tuple[Box, ...], ...]


@dataclass(frozen=True)
class Shown:
    """A picture for one place of the grid: see ImageView.show. With a `stack`, the one of it that is shown first."""

    picture: PictureLike
    view: View = View()
    key: str = ""
    title: str = ""
    stack: Stack | None = None


class ViewGrid(Grid):
    """Up to four ImageViews."""

    DEFAULT_CSS = """
    ViewGrid { grid-size: 1; }
    ViewGrid > ImageView { width: 1fr; height: 1fr; }
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("l", "link", N_("Link views"), show=False)]

    def __init__(
        self, graphics: Graphics, *, preparation: ImagePreparation | None = None, id: str | None = None, classes: str | None = None
    ) -> None:
        super().__init__(id=id, classes=classes)
        self.graphics = graphics
        self.linked = False
        self._views = tuple(ImageView(graphics, preparation=preparation) for _place in range(MAX_VIEWS))
        self._count = 1

    def compose(self) -> ComposeResult:
        yield from self._views

    def on_mount(self) -> None:
        localise_bindings(self)
        self._arrange()

    @property
    def views(self) -> tuple[ImageView, ...]:
        """Those that show something (one at least)."""
        return self._views[: self._count]

    @property
    def active(self) -> ImageView:
        """The one that has the keys, else the first."""
        return next((view for view in self.views if view.has_focus), self._views[0])

    def set_preparation(self, preparation: ImagePreparation | None) -> None:
        """What the model's view is made with, from now on."""
        for view in self._views:
            view.preparation = preparation

    def show(self, pictures: Sequence[Shown]) -> None:
        """These side by side, the rest of them (beyond four) left out."""
        shown = pictures[:MAX_VIEWS]
        self._count = max(1, len(shown))
        for place, view in enumerate(self._views):
            one = shown[place] if place < len(shown) else None
            view.set_title(one.title if one else "")
            if one and one.stack:
                view.show_series(one.stack.pictures, one.stack.keys, one.stack.position, one.view, one.stack.masks)
            else:
                view.show(one.picture if one else None, one.view if one else None, one.key if one else "")
        self._arrange()

    def on_resize(self, event: events.Resize) -> None:
        self._arrange()

    def _arrange(self) -> None:
        for place, view in enumerate(self._views):
            view.display = place < self._count
        wide = self.size.width >= SIDE_BY_SIDE_COLUMNS
        columns = 1 if self._count == 1 or (self._count == 2 and not wide) else 2
        self.styles.grid_size_columns = columns
        self.styles.grid_size_rows = -(-self._count // columns)

    def action_link(self) -> None:
        """Follow one another in zoom, pan and frame, or no longer."""
        self.linked = not self.linked

    def on_image_view_looked(self, message: ImageView.Looked) -> None:
        """Repeat zoom, pan and frame in the others; they say nothing in turn, so this ends here."""
        if not self.linked:
            return
        source = message.image_view
        for view in self.views:
            if view is not source and view.picture is not None:
                # In its own turn: said from here, its new view would be taken for this grid's word and go no further.
                view.call_later(view.follow, source.viewport, source.position, source.view.frame)
