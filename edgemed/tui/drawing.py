"""From a picture and the way it is looked at to the pixels of a widget, away from the screen's own thread.

    drawer = Drawer()
    canvas = drawer.draw(DrawRequest(picture, view, viewport))     # an RGB image of viewport.canvas

The last rendered frame is kept, so that zooming and panning over a large radiograph render nothing again. Not for two threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image, ImageDraw

from edgemed.clinic.records import Box, ImageFacts, View, Window
from edgemed.core.images import ImagePreparation, prepare
from edgemed.tui.viewport import Viewport

MASK_COLOUR = (255, 200, 0)
CURSOR_COLOUR = (0, 255, 255)


class PictureLike(Protocol):
    """What the viewer needs of edgemed.clinic.imaging.Picture.

    `render` gives an image of facts.width_px × facts.height_px, in whose pixels masks are given. The methods may decode, in another
    process at that, and raise ImageError or DicomError: the viewer calls them in its worker thread only.
    """

    @property
    def name(self) -> str: ...
    @property
    def facts(self) -> ImageFacts: ...
    @property
    def windows(self) -> Sequence[Window]: ...
    @property
    def monochrome(self) -> bool: ...
    def default_window(self, frame: int = 0) -> Window | None: ...
    def render(self, view: View = ...) -> Image.Image: ...


@dataclass(frozen=True)
class DrawRequest:
    """One look at a picture. With `preparation`, what the model sees of it; `cursor` is the mask that is being placed."""

    picture: PictureLike
    view: View
    viewport: Viewport
    preparation: ImagePreparation | None = None
    show_masks: bool = False
    cursor: Box | None = None


@dataclass(frozen=True)
class Drawn:
    """The pixels for the screen, the viewport that they show, and the window that the file itself gives the frame (None for colour)."""

    request: DrawRequest
    canvas: Image.Image
    viewport: Viewport
    own_window: Window | None = None


class Drawer:
    """Renders and keeps the last frame."""

    def __init__(self) -> None:
        self._key: tuple[PictureLike, View, ImagePreparation | None] | None = None
        self._source: Image.Image | None = None

    def draw(self, request: DrawRequest) -> Drawn:
        """Raises what the picture raises (ImageError, DicomError)."""
        source = self._rendered(request)
        viewport = request.viewport.resized(source.size, request.viewport.canvas, request.viewport.pixel_aspect)
        canvas = viewport.draw(source, squares=request.preparation is not None)
        if request.preparation is None:
            _outline(canvas, viewport, request)
        return Drawn(request, canvas, viewport, request.picture.default_window(request.view.frame))

    def _rendered(self, request: DrawRequest) -> Image.Image:
        key = (request.picture, request.view, request.preparation)
        # A picture is itself and nothing else: compared by identity, for it may hold arrays.
        if self._source is None or self._key is None or key[0] is not self._key[0] or key[1:] != self._key[1:]:
            self._key = self._source = None
            source = request.picture.render(request.view)
            self._source = Image.fromarray(prepare(source, request.preparation)) if request.preparation else source
            self._key = key
        return self._source


def _outline(canvas: Image.Image, viewport: Viewport, request: DrawRequest) -> None:
    boxes = [(box, MASK_COLOUR) for box in request.view.masks] if request.show_masks else []
    if request.cursor is not None:
        boxes.append((request.cursor, CURSOR_COLOUR))
    pen = ImageDraw.Draw(canvas)
    for box, colour in boxes:
        left, top = viewport.to_canvas(box.left, box.top)
        right, bottom = viewport.to_canvas(box.right, box.bottom)
        pen.rectangle((round(left), round(top), max(round(left), round(right) - 1), max(round(top), round(bottom) - 1)), outline=colour)
