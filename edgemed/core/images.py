"""From an image file to the exact pixels a tower sees, once for training, evaluation and the runtime.

    pixels = prepare(load_image(path), preparation)     # uint8 [size, size, 3]
    x = normalise(pixels, preparation)                  # float32 [3, size, size], what torch is fed

The runtime is handed `pixels` and normalises inside llama.cpp with the same mean and std. Only Pillow and numpy;
knows nothing about DICOM (edgemed/clinic) or models.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import Field

from edgemed.core.errors import ImageError
from edgemed.core.files import found_at
from edgemed.core.model import Float32, Frozen

# 64 Mpx decode to 192 MB of RGB; a full-field digital mammogram has about 20 Mpx.
MAX_PIXELS = 64_000_000
# A padded square's side; JPEG allows no more, and Pillow's filters take memory by the side.
MAX_SIDE_PX = 65_535
# A padded square wider than this is resized in bands of rows, so that 60,000 × 10 px never becomes 60,000².
BAND_SIDE_PX = 4096
BAND_ROWS = 256

# What Pillow's decoders raise on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, struct.error, IndexError, KeyError, TypeError, OverflowError)

Mode = Literal["pad", "stretch", "crop"]
# The largest side of a tower's input that is believed; published towers take 224 to 980.
MAX_SIZE_PX = 4096
Level = Annotated[int, Field(ge=0, le=255)]
# What values are divided by.
Spread = Annotated[Float32, Field(gt=1e-6)]


class ImagePreparation(Frozen):
    """How an image becomes `size_px` × `size_px` RGB, and how the tower's input is normalised.

    pad:     centred on a square of side max(w, h) filled with `pad_colour`, then resized (LLaVA's `image_aspect_ratio = "pad"`)
    stretch: resized to the square, aspect ratio lost (SiglipImageProcessor)
    crop:    shortest edge resized to `size_px`, centre cropped (CLIPImageProcessor)
    """

    size_px: int = Field(ge=1, le=MAX_SIZE_PX)
    mode: Mode
    pad_colour: tuple[Level, Level, Level] = (0, 0, 0)
    mean: tuple[Float32, Float32, Float32]
    std: tuple[Spread, Spread, Spread]


def load_image(source: Path | bytes, name: str = "the image") -> Image.Image:
    """Decode a file (or its bytes) to an upright RGB image.

    Animated files give their first frame; 16-bit and float grey is scaled from its own minimum and maximum to 0–255;
    transparency is laid over black. The size is checked before decoding. Raises ImageError.
    """
    return load_pixels(source, name)[0]


def load_pixels(source: Path | bytes, name: str = "the image") -> tuple[Image.Image, NDArray[np.generic] | None]:
    """`load_image`, and the [height, width] values of a file that holds nothing but grey (8, 16 or 32 bits, float), to be windowed.

    The values are the file's own; None for colours, palettes and transparency. Raises ImageError.
    """
    if isinstance(source, Path):
        name = source.name
        if not source.is_file():
            raise ImageError(f"Expected an image at {source}, found {found_at(source, 'no such file')}.", "Check the path.")
    try:
        if (source.stat().st_size if isinstance(source, Path) else len(source)) == 0:
            raise ImageError(f"Expected an image in {name}, found an empty file.", "Export or copy the image again.")
        with warnings.catch_warnings():
            # Our own, lower limit follows; what Pillow warns of besides (damaged EXIF) is no reason to say anything.
            warnings.simplefilter("ignore")
            with Image.open(source if isinstance(source, Path) else io.BytesIO(source)) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    raise ImageError(
                        f"Expected an image of at most {MAX_PIXELS // 1_000_000} megapixels in {name}, found {width} × {height}.",
                        "Scale it down first.",
                    )
                if max(width, height) > MAX_SIDE_PX:
                    raise ImageError(
                        f"Expected an image of at most {MAX_SIDE_PX} pixels a side in {name}, found {width} × {height}.",
                        "Scale it down first.",
                    )
                image.seek(0)
                image.load()
                upright = ImageOps.exif_transpose(image)
                return _to_rgb(upright), _grey_values(upright)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"Expected an image of at most {MAX_PIXELS // 1_000_000} megapixels in {name}, found far more.", "Scale it down first."
        ) from error
    except UnidentifiedImageError as error:
        raise ImageError(
            f"Expected an image in {name}, found a file of no image format.", "Use DICOM, PNG, JPEG, TIFF, WebP, BMP or GIF."
        ) from error
    except _DAMAGED as error:
        raise ImageError(
            f"Expected a readable image in {name}, found a damaged one ({error}).", "Export or copy the image again."
        ) from error


def count_pages(data: bytes) -> int:
    """Pages or frames in the bytes of an image that `load_pixels` has read, which takes the first."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(data)) as image:
                return int(getattr(image, "n_frames", 1))
        except _DAMAGED:
            return 1


def _is_deep_grey(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _grey_values(image: Image.Image) -> NDArray[np.generic] | None:
    if image.mode == "L" and "transparency" not in image.info:
        return np.asarray(image)
    return np.asarray(image) if _is_deep_grey(image) else None


def _to_rgb(image: Image.Image) -> Image.Image:
    if _is_deep_grey(image):
        return _scale_grey(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (0, 0, 0, 255)), rgba).convert("RGB")
    return image.convert("RGB")


def _scale_grey(image: Image.Image) -> Image.Image:
    # Pillow's own conversion clips at 255, which turns a 12- or 16-bit radiograph white.
    values = np.asarray(image, dtype=np.float32)
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    scale = 255.0 / (high - low) if high > low else 0.0
    grey = np.nan_to_num((values - low) * scale, nan=0.0, posinf=255.0, neginf=0.0)
    return Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))


def prepare(image: Image.Image, preparation: ImagePreparation) -> NDArray[np.uint8]:
    """RGB image → uint8 [size_px, size_px, 3], bicubic with Pillow's antialiasing."""
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    resized = {"pad": _pad, "stretch": _stretch, "crop": _crop}[preparation.mode](rgb, preparation)
    return np.array(resized, dtype=np.uint8)


def _stretch(image: Image.Image, p: ImagePreparation) -> Image.Image:
    return image.resize((p.size_px, p.size_px), Image.Resampling.BICUBIC)


def _pad(image: Image.Image, p: ImagePreparation) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    if side <= BAND_SIDE_PX:
        square = Image.new("RGB", (side, side), p.pad_colour)
        square.paste(image, (left, top))
        return square.resize((p.size_px, p.size_px), Image.Resampling.BICUBIC)
    # Pillow resizes all rows first and then all columns, and rows do not depend on one another: bands give the same bytes.
    narrow = Image.new("RGB", (p.size_px, side), p.pad_colour)
    for start in range(0, height, BAND_ROWS):
        stop = min(start + BAND_ROWS, height)
        band = Image.new("RGB", (side, stop - start), p.pad_colour)
        band.paste(image.crop((0, start, width, stop)), (left, 0))
        narrow.paste(band.resize((p.size_px, stop - start), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((p.size_px, p.size_px), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, p: ImagePreparation) -> Image.Image:
    # CLIPImageProcessor: shortest edge to size_px, the long one int(short·ratio), then the centre. The centre is cut out of the
    # source first (with a margin for the filter) only where the long edge would be huge.
    width, height = image.size
    short, long = min(width, height), max(width, height)
    long_px = int(p.size_px * long / short)
    if long_px > BAND_SIDE_PX:
        keep = min(long, 2 * short)
        start = (long - keep) // 2
        image = image.crop((start, 0, start + keep, height) if width > height else (0, start, width, start + keep))
        width, height = image.size
        long_px = int(p.size_px * keep / short)
    size = (p.size_px, long_px) if width <= height else (long_px, p.size_px)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - p.size_px) // 2, (size[1] - p.size_px) // 2
    return resized.crop((left, top, left + p.size_px, top + p.size_px))


def normalise(pixels: NDArray[np.uint8], preparation: ImagePreparation) -> NDArray[np.float32]:
    """uint8 [..., H, W, 3] → float32 [..., 3, H, W]: (x / 255 − mean) / std."""
    scaled = pixels.astype(np.float32) / np.float32(255.0)
    x = (scaled - np.asarray(preparation.mean, np.float32)) / np.asarray(preparation.std, np.float32)
    return np.ascontiguousarray(np.moveaxis(x, -1, -3))


def hash_pixels(pixels: NDArray[np.uint8]) -> str:
    """Hex SHA-256 of prepared pixels: the key under which an image's embedding is cached."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
