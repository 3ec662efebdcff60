"""Pictures out of whole pixels: Kitty's protocol and Sixels, with the methods of terminal.Surface.

Import this through terminal.build_surface only: textual-image, which writes both formats, asks the terminal questions when imported.
Its Sixel widget is not used: it composes itself anew for every image, and in a container that makes Textual 8.2 paint the rest of the
screen once in the colour of the background and not again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL.Image import Image
from rich.control import Control
from rich.segment import ControlType, Segment
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget
from textual_image._sixel import image_to_sixels
from textual_image.widget import TGPImage


def grey_if_grey(image: Image) -> Image:
    """A colour image without colour as one of grey."""
    pixels = np.asarray(image)
    return image.convert("L") if pixels.ndim == 3 and (pixels == pixels[..., :1]).all() else image


class KittySurface(TGPImage, Renderable=TGPImage._Renderable):
    """Kitty's protocol. The library compresses and sends when Textual draws: the image is no larger than its cells by then, and where
    it is grey, a third of the bytes."""

    def encode(self, image: Image) -> Image:
        return grey_if_grey(image)

    def put(self, encoded: Image | None) -> None:
        self.image = encoded


@dataclass(frozen=True)
class Sixels:
    """An image and its Sixels."""

    image: Image
    code: str


class SixelSurface(Widget):
    """Sixels, put out with the widget's last line, after its cells were blanked; the cursor then goes on where Textual expects it."""

    def __init__(self, cell_px: tuple[int, int], classes: str) -> None:
        super().__init__(classes=classes)
        self._cell_px = cell_px
        self._sixels: Sixels | None = None

    def encode(self, image: Image) -> Sixels:
        """In any thread. Sixels have 256 colours: a grey image keeps every level when it is handed over as grey; of colours the
        library would keep some thirty greys, which draws contours into a lung that are not there."""
        kept = grey_if_grey(image)
        return Sixels(kept, image_to_sixels(kept))

    def put(self, encoded: Sixels | None) -> None:
        self._sixels = encoded
        self.refresh()

    def render_lines(self, crop: Region) -> list[Strip]:
        # Under a dialog Textual tints what lies below, and would tint the code. An image for another size would run over its neighbours
        # until the next one arrives.
        size = (self.size.width * self._cell_px[0], self.size.height * self._cell_px[1])
        if self._sixels is None or self._sixels.image.size != size or not crop.area or not self.screen.is_active:
            return [Strip.blank(crop.width, self.rich_style)] * crop.height
        place = self.screen.find_widget(self).visible_region
        segments = [
            Segment(Control.move_to(place.x, place.y).segment.text),
            Segment(self._code(self._sixels, crop), control=((ControlType.CURSOR_FORWARD, 0),)),
            Segment(Control.move_to(place.right, place.bottom).segment.text),
        ]
        return [Strip([])] * (crop.height - 1) + [Strip(segments, cell_length=crop.width)]

    def _code(self, sixels: Sixels, crop: Region) -> str:
        if crop == self.size.region:
            return sixels.code
        across, down = self._cell_px
        return image_to_sixels(sixels.image.crop((crop.x * across, crop.y * down, crop.right * across, crop.bottom * down)))
