"""The case's images in a list: Enter shows one, Space says whether questions are about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from textual.binding import Binding
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edgemed.clinic.records import CaseImage, View
from edgemed.tui.i18n import N_, localise_bindings
from edgemed.tui.texts import say_image


class ImageStrip(OptionList):
    """Which images there are, which one is looked at (highlighted), and which are asked about (●)."""

    DEFAULT_CSS = """
    ImageStrip { height: auto; max-height: 5; border: none; padding: 0; background: $surface;
        text-wrap: nowrap; text-overflow: ellipsis; }
    ImageStrip:focus { border: none; background-tint: $foreground 0%; }
    ImageStrip.-none { display: none; }
    """
    BINDINGS = [Binding("space", "mark", N_("Ask about it or not"))]

    class Shown(Message):
        """An image is to be looked at."""

        def __init__(self, image: CaseImage) -> None:
            super().__init__()
            self.image = image

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id, markup=False)
        self.images: list[CaseImage] = []
        self._asked: set[str] = set()

    def on_mount(self) -> None:
        localise_bindings(self)

    def fill(self, images: Sequence[CaseImage], show: str | None = None) -> None:
        """The case's images; `show`: the one to look at, which is asked about from now on. At first only the last is asked about."""
        # How an image is looked at here is newer than what was read: keeping it takes a while.
        views = {image.id: image.view for image in self.images}
        self.images = [replace(image, view=views.get(image.id, image.view)) for image in images]
        known = {image.id for image in images}
        self._asked &= known
        if show is not None:
            self._asked.add(show)
        elif not self._asked and images:
            self._asked.add(images[-1].id)
        self.set_class(not images, "-none")
        position = next((i for i, image in enumerate(images) if image.id == show), len(images) - 1)
        self._draw(position)
        if images:
            self.post_message(self.Shown(self.images[position]))

    @property
    def asked(self) -> tuple[CaseImage, ...]:
        """The images that the next question is about."""
        return tuple(image for image in self.images if image.id in self._asked)

    def keep_view(self, image_id: str, view: View) -> None:
        """An image is looked at in another way now."""
        self.images = [replace(image, view=view) if image.id == image_id else image for image in self.images]

    def find(self, image_id: str) -> CaseImage | None:
        """An image of the case."""
        return next((image for image in self.images if image.id == image_id), None)

    def action_mark(self) -> None:
        """Ask about the highlighted image, or no longer."""
        if self.highlighted is not None:
            self._asked ^= {self.images[self.highlighted].id}
            self._draw(self.highlighted)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(self.Shown(self.images[event.option_index]))

    def _draw(self, highlighted: int) -> None:
        self.clear_options()
        self.add_options(Option(Content(f"{'●' if image.id in self._asked else '○'} {say_image(image)}")) for image in self.images)
        self.highlighted = highlighted if self.images else None
