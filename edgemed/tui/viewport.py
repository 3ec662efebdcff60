"""Which part of an image is on the screen: zoom, pan, and from a screen pixel to an image pixel and back. Arithmetic only.

    port = Viewport(image=(2048, 2500), canvas=(80, 44))      # whole image, centred
    port.zoomed(2).panned(0.25, 0).draw(image)                # an RGB image of the canvas's size, with black where there is no image

A canvas pixel may be taller than wide (`pixel_aspect` is its width over its height): the image keeps its proportions all the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from PIL import Image

# At the largest zoom one image pixel is this many canvas pixels high (at least a fifth of the canvas stays in sight).
MAX_SCALE = 16.0
# Where an image is magnified beyond this, single pixels are shown as squares, so that nobody reads structure into interpolation.
SQUARES_FROM_SCALE = 4.0


@dataclass(frozen=True)
class Viewport:
    """`zoom` 1 shows the whole image; `centre` is the point in the middle, as fractions of the image's width and height."""

    image: tuple[int, int]
    canvas: tuple[int, int]
    pixel_aspect: float = 1.0
    zoom: float = 1.0
    centre: tuple[float, float] = (0.5, 0.5)

    @property
    def fit_scale(self) -> float:
        """Canvas rows per image row when the whole image is shown."""
        return min(self.canvas[0] * self.pixel_aspect / self.image[0], self.canvas[1] / self.image[1])

    @property
    def scale(self) -> float:
        return self.fit_scale * self.zoom

    @property
    def max_zoom(self) -> float:
        return max(5.0, MAX_SCALE / self.fit_scale)

    @property
    def visible(self) -> tuple[float, float]:
        """Width and height in image pixels of what fits on the canvas; more than the image where there is a margin."""
        return self.canvas[0] * self.pixel_aspect / self.scale, self.canvas[1] / self.scale

    @property
    def origin(self) -> tuple[float, float]:
        """The image point at the canvas's top left corner; negative where there is a margin."""
        across, down = self.visible
        return self.centre[0] * self.image[0] - across / 2, self.centre[1] * self.image[1] - down / 2

    def zoomed(self, factor: float, at: tuple[float, float] | None = None) -> Viewport:
        """Magnified by `factor`; the canvas point `at` (the middle if None) keeps the image point under it."""
        zoom = min(max(self.zoom * factor, 1.0), self.max_zoom)
        new = replace(self, zoom=zoom)
        if at is not None:
            before, after = self.to_image(*at), new.to_image(*at)
            new = replace(
                new,
                centre=(
                    new.centre[0] + (before[0] - after[0]) / self.image[0],
                    new.centre[1] + (before[1] - after[1]) / self.image[1],
                ),
            )
        return new._kept_inside()

    def panned(self, right: float, down: float) -> Viewport:
        """Moved over the image by fractions of what is visible."""
        across, height = self.visible
        x, y = self.centre[0] + right * across / self.image[0], self.centre[1] + down * height / self.image[1]
        return replace(self, centre=(x, y))._kept_inside()

    def resized(self, image: tuple[int, int], canvas: tuple[int, int], pixel_aspect: float) -> Viewport:
        """The same zoom and centre for another image or canvas."""
        new = replace(self, image=image, canvas=canvas, pixel_aspect=pixel_aspect)
        return new.zoomed(1.0)

    def _kept_inside(self) -> Viewport:
        half = tuple(min(visible / side / 2, 0.5) for visible, side in zip(self.visible, self.image, strict=True))
        x, y = (min(max(value, margin), 1 - margin) for value, margin in zip(self.centre, half, strict=True))
        return replace(self, centre=(x, y))

    def to_image(self, x: float, y: float) -> tuple[float, float]:
        """The image point under a canvas point; may lie outside the image."""
        left, top = self.origin
        return left + x * self.pixel_aspect / self.scale, top + y / self.scale

    def to_canvas(self, x: float, y: float) -> tuple[float, float]:
        """The canvas point of an image point."""
        left, top = self.origin
        return (x - left) * self.scale / self.pixel_aspect, (y - top) * self.scale

    def draw(self, image: Image.Image, squares: bool = False) -> Image.Image:
        """What is visible of `image` (of size `self.image`), scaled to the canvas. `squares`: no interpolation when magnifying."""
        canvas = Image.new("RGB", self.canvas)
        left, top = (max(value, 0.0) for value in self.origin)
        right, bottom = (min(a + b, side) for a, b, side in zip(self.origin, self.visible, self.image, strict=True))
        x0, y0 = (round(value) for value in self.to_canvas(left, top))
        x1, y1 = (round(value) for value in self.to_canvas(right, bottom))
        size = max(1, x1 - x0), max(1, y1 - y0)
        magnified = self.scale > (1.0 if squares else SQUARES_FROM_SCALE)
        method = Image.Resampling.NEAREST if magnified else Image.Resampling.BICUBIC
        part = image.resize(size, method, box=(left, top, right, bottom), reducing_gap=None if magnified else 2.0)
        canvas.paste(part, (x0, y0))
        return canvas
