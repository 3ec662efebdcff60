"""The case's images in a list: Enter shows one, Space says whether questions are about it. A series is one line.

    strip.fill(images, show=image_id)        # the case's; of a series the image of this id is the one that is shown and asked about
    strip.asked                              # one image a marked line: of a series the one that is looked at
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from textual.binding import Binding
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from edgemed.clinic.grouping import Group, group_id, group_images, middle_of
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
        self._groups: list[tuple[str, ...]] = []
        self._asked: set[str] = set()
        # Of each group the image that is looked at, and of each image its group.
        self._shown: dict[str, str] = {}
        self._group_of: dict[str, str] = {}

    def on_mount(self) -> None:
        localise_bindings(self)

    def fill(self, images: Sequence[CaseImage], show: str | None = None, seen: Iterable[str] = ()) -> None:
        """The case's images; `show`: the one to look at, which is asked about from now on. At first only the last is asked about.

        `seen`: images that were asked about, the last one last: of a series that is the one to go on with.
        """
        # How an image is looked at here is newer than what was read: keeping it takes a while.
        views = {image.id: image.view for image in self.images}
        self.images = [replace(image, view=views.get(image.id, image.view)) for image in images]
        groups = group_images(self.images)
        self._groups = [tuple(image.id for image in group) for group in groups]
        self._group_of = {image.id: group_id(image) for image in self.images}
        self._shown = {group_id(group[0]): middle_of(group).id for group in groups} | {
            self._group_of[image_id]: image_id
            for image_id in (*self._shown.values(), *seen, *([show] if show else []))
            if image_id in self._group_of
        }
        self._asked &= set(self._shown)
        wanted = self._group_of.get(show or "")
        if wanted is not None:
            self._asked.add(wanted)
        elif not self._asked and groups:
            self._asked.add(group_id(groups[-1][0]))
        self.set_class(not images, "-none")
        position = next((i for i, group in enumerate(groups) if group_id(group[0]) == wanted), len(groups) - 1)
        self._draw(position)
        if groups:
            self.post_message(self.Shown(self._line(position)))

    @property
    def asked(self) -> tuple[CaseImage, ...]:
        """The images that the next question is about: of a series the one that is looked at."""
        lines = map(self._line, range(len(self._groups)))
        return tuple(image for image in lines if self._group_of[image.id] in self._asked)

    @property
    def current(self) -> CaseImage | None:
        """The image of the highlighted line."""
        return None if self.highlighted is None else self._line(self.highlighted)

    def keep_view(self, image_id: str, view: View) -> None:
        """An image is looked at in another way now; of a series it is the one that is looked at."""
        self.images = [replace(image, view=view) if image.id == image_id else image for image in self.images]
        group = self._group_of.get(image_id)
        if group is not None and self._shown[group] != image_id:
            self._shown[group] = image_id
            line = next(i for i, ids in enumerate(self._groups) if image_id in ids)
            self.replace_option_prompt_at_index(line, self._say(self._line(line)))

    def find(self, image_id: str) -> CaseImage | None:
        """An image of the case."""
        return next((image for image in self.images if image.id == image_id), None)

    def group_of(self, image_id: str) -> Group:
        """The files of the image's series in their order, or the image alone."""
        by_id = {image.id: image for image in self.images}
        return next((tuple(by_id[one] for one in ids) for ids in self._groups if image_id in ids), ())

    def shown_of(self, image: CaseImage) -> CaseImage:
        """The image itself as it is looked at now; of its series the one that is looked at now."""
        return self.find(self._shown.get(self._group_of.get(image.id, ""), "")) or image

    def action_mark(self) -> None:
        """Ask about the highlighted line, or no longer."""
        if self.current is not None and self.highlighted is not None:
            self._asked ^= {self._group_of[self.current.id]}
            self._draw(self.highlighted)

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.post_message(self.Shown(self._line(event.option_index)))

    def _line(self, index: int) -> CaseImage:
        ids = self._groups[index]
        shown = self.find(self._shown[self._group_of[ids[0]]])
        assert shown is not None, "what is shown is an image of the case"
        return shown

    def _say(self, image: CaseImage) -> Content:
        return Content(f"{'●' if self._group_of[image.id] in self._asked else '○'} {say_image(image)}")

    def _draw(self, highlighted: int) -> None:
        self.clear_options()
        self.add_options(Option(self._say(self._line(index))) for index in range(len(self._groups)))
        self.highlighted = highlighted if self._groups else None
