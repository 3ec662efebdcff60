"""An image of a series before anybody looked at it: known by what the store says, opened when it is drawn.

    picture = StoredPicture(image, session.picture)
    picture.name, picture.facts             # at once, from the record
    picture.render(view)                    # opens it: in a worker thread only

A series may have hundreds of files; the session keeps the last few open. `windows` and `monochrome` are known after the first drawing,
until then nothing is offered that a colour image would not have. Knows no screen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from edgemed.clinic.imaging import Picture
from edgemed.clinic.records import CaseImage, ImageFacts, View, Window
from edgemed.core.text import one_line
from edgemed.tui.drawing import PictureLike
from edgemed.tui.viewgrid import Shown, Stack


class StoredPicture:
    """Stands for a picture in the viewer (see drawing.PictureLike)."""

    def __init__(self, image: CaseImage, open_image: Callable[[CaseImage], Picture]) -> None:
        self._image, self._open = image, open_image
        self.windows: Sequence[Window] = ()
        self.monochrome = False

    @property
    def name(self) -> str:
        """The file's name."""
        return one_line(self._image.name)

    @property
    def facts(self) -> ImageFacts:
        """As they were recorded when it was attached."""
        return self._image.facts

    def load(self) -> Picture:
        """The picture itself. Raises ImageError, DicomError, StoreError."""
        picture = self._open(self._image)
        self.windows, self.monochrome = picture.windows, picture.monochrome
        return picture

    def default_window(self, frame: int = 0) -> Window | None:
        """The window that the file gives a frame."""
        return self.load().default_window(frame)

    def render(self, view: View = View()) -> Image.Image:  # noqa: B008 — frozen
        """The frame as it is looked at."""
        return self.load().render(view)


def stack_of(group: Sequence[CaseImage], open_image: Callable[[CaseImage], Picture]) -> dict[str, StoredPicture]:
    """The pictures of a series in their order, by their images' ids; none is opened."""
    return {image.id: StoredPicture(image, open_image) for image in group}


def place_stack(pictures: dict[str, PictureLike], group: Sequence[CaseImage], shown: CaseImage, title: str) -> Shown:
    """The series for a place of the grid, with `shown` in sight and each file's own masks."""
    keys = tuple(pictures)
    stack = Stack(tuple(pictures.values()), keys, keys.index(shown.id), tuple(image.view.masks for image in group))
    return Shown(pictures[shown.id], shown.view, shown.id, title, stack)
