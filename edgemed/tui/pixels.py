"""Pictures out of whole pixels, through textual-image: Kitty's protocol and Sixels, with the methods of terminal.Surface.

Import this through terminal.build_surface only: textual-image asks the terminal questions when it is imported.
"""

from __future__ import annotations

from PIL.Image import Image
from textual_image.widget import SixelImage, TGPImage


class KittySurface(TGPImage, Renderable=TGPImage._Renderable):
    """Kitty's protocol. The library compresses and sends when Textual draws: the image is no larger than its cells by then."""

    def encode(self, image: Image) -> Image:
        return image

    def put(self, encoded: Image | None) -> None:
        self.image = encoded


class SixelSurface(SixelImage, Renderable=SixelImage._Renderable):
    """Sixels, made from what is visible."""

    def encode(self, image: Image) -> Image:
        return image

    def put(self, encoded: Image | None) -> None:
        self.image = encoded
