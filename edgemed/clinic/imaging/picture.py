"""An opened image: its facts, its windows, and any of its frames as the person sees it and the model is given it.

    picture = open_picture(Path("wrist.dcm"))
    image = picture.render(View(frame=0, window=picture.windows[0]))

A rendered image is upright, 8-bit RGB, with square pixels; its size is that of the facts, and masks are in its pixels. The file's bytes
are kept, frames are decoded when they are first needed, and some are kept for all pictures together (limits.FRAME_CACHE_BYTES).
"""

from __future__ import annotations

import itertools
import secrets
import threading
import weakref
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgemed.clinic.imaging import client
from edgemed.clinic.imaging.client import Frame
from edgemed.clinic.imaging.limits import FRAME_CACHE_BYTES, MAX_FILE_BYTES
from edgemed.clinic.imaging.sniff import is_dicom
from edgemed.clinic.imaging.window import CT_WINDOWS, apply_voi_lut, apply_window, full_window
from edgemed.clinic.records import Box, ImageFacts, PatientIdentity, View, Window
from edgemed.core.errors import DicomError, ImageError
from edgemed.core.files import found_at, os_errors
from edgemed.core.images import MAX_PIXELS, MAX_SIDE_PX, count_pages, load_pixels
from edgemed.core.text import one_line


class FrameCache:
    """Decoded frames of all pictures, the ones used longest ago dropped first. The last one stays, however large it is."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._frames: OrderedDict[tuple[int, int], Frame] = OrderedDict()
        self._lock = threading.RLock()  # a picture may be collected, and its frames dropped, inside any of these

    def get(self, key: tuple[int, int]) -> Frame | None:
        """A frame that is kept."""
        with self._lock:
            frame = self._frames.get(key)
            if frame is not None:
                self._frames.move_to_end(key)
            return frame

    def put(self, key: tuple[int, int], frame: Frame) -> None:
        """Keep a frame."""
        with self._lock:
            if key not in self._frames:
                self._frames[key] = frame
                self._bytes += frame.values.nbytes
            while self._bytes > self._max_bytes and len(self._frames) > 1:
                self._bytes -= self._frames.popitem(last=False)[1].values.nbytes

    def clear(self) -> None:
        """Forget every frame."""
        with self._lock:
            self._frames.clear()
            self._bytes = 0

    def drop(self, picture: int) -> None:
        """Forget a picture's frames."""
        with self._lock:
            for key in [key for key in self._frames if key[0] == picture]:
                self._bytes -= self._frames.pop(key).values.nbytes


_cache = FrameCache(FRAME_CACHE_BYTES)
_keys = itertools.count()


def forget_frames() -> None:
    """End the decoding process and drop the frames that are kept: the program is locked. Open pictures decode anew when they are shown."""
    client.close()
    _cache.clear()


class Picture:
    """An opened image file. Made by open_picture."""

    def __init__(self, name: str, facts: ImageFacts, identity: PatientIdentity, windows: tuple[Window, ...], monochrome: bool) -> None:
        self._key = next(_keys)
        weakref.finalize(self, _cache.drop, self._key).atexit = False
        self.name = name
        self.facts = facts
        self.identity = identity
        self.windows = windows
        self.monochrome = monochrome
        self.burnt_in = ""
        self.secondary = False

    def value_range(self, frame: int = 0) -> tuple[float, float]:
        """The least and the greatest value of a frame, padding left out; (0, 255) of colours. Raises DicomError."""
        found = self.frame(frame)
        return found.low, found.high

    def default_window(self, frame: int = 0) -> Window | None:
        """The window that `View.window = None` means: the file's first, a CT's soft tissue, the frame's full range; None for colours.

        A file with a VOI LUT and no window is shown through the LUT; the window is then the LUT's range, a start to change it from.
        """
        found = self.frame(frame)
        if not found.monochrome:
            return None
        if found.windows:
            return found.windows[0]
        if found.voi_lut is not None:
            return full_window(found.voi_lut.first, found.voi_lut.first + len(found.voi_lut.entries) - 1, "lut")
        return self.windows[0] if self.windows else full_window(found.low, found.high)

    def resolve(self, view: View) -> View:
        """The view with the window that `render` uses written out, to be kept with an answer. None stays for colours and VOI LUTs."""
        return view if view.window is not None or self._through_lut(view.frame) else replace(view, window=self.default_window(view.frame))

    def _through_lut(self, index: int) -> bool:
        found = self.frame(index)
        return found.voi_lut is not None and not found.windows

    def render(self, view: View = View()) -> Image.Image:  # noqa: B008 — frozen
        """8-bit RGB: exactly what the person sees and what the model is given. Raises ImageError, DicomError, InputError."""
        grey_or_rgb = self.render_stored(view)
        image = Image.fromarray(grey_or_rgb).convert("RGB")
        size = (self.facts.width_px, self.facts.height_px)
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
        for box in view.masks:
            image.paste((0, 0, 0), _clipped(box, size))
        return image

    def render_stored(self, view: View) -> NDArray[np.uint8]:
        """`render` on the file's own grid of pixels, masks left out: uint8 [rows, columns] or [rows, columns, 3]."""
        frame = self.frame(view.frame)
        pixels = self._shown(view.frame, frame, view.window)
        if view.invert != frame.inverse:
            pixels = 255 - pixels
        if frame.padding is not None:
            pixels[(frame.values >= frame.padding[0]) & (frame.values <= frame.padding[1])] = 0
        return pixels

    def _shown(self, index: int, frame: Frame, window: Window | None) -> NDArray[np.uint8]:
        if window is None and frame.voi_lut is not None and not frame.windows:
            return apply_voi_lut(frame.values, frame.voi_lut)
        window = window or self.default_window(index)
        return np.array(frame.values, np.uint8) if window is None else apply_window(frame.values, window)

    def frame(self, index: int) -> Frame:
        """A frame's values. Raises ImageError where there is no such frame, DicomError where it is damaged."""
        if not 0 <= index < self.facts.frames:
            raise ImageError(f"Expected a frame from 0 to {self.facts.frames - 1} of {self.name}, found {index}.", "Choose another frame.")
        kept = _cache.get((self._key, index))
        if kept is None:
            kept = self._decode(index)
            _cache.put((self._key, index), kept)
        return kept

    def _decode(self, index: int) -> Frame:
        raise NotImplementedError


class PlainPicture(Picture):
    """PNG, JPEG, TIFF, WebP and what else Pillow reads: decoded when opened, as core.images does it."""

    def __init__(self, data: bytes, name: str) -> None:
        image, values = load_pixels(data, name)
        pages = count_pages(data)
        told = (f"The file has {pages} pages or frames; only the first is shown.",) if pages > 1 else ()
        facts = ImageFacts("plain", image.width, image.height, warnings=told)
        if values is None:
            self._frame = Frame(np.asarray(image), monochrome=False)
        else:
            low, high = _range(values)
            windows = (full_window(0, 255),) if values.dtype == np.uint8 else (full_window(low, high),)
            self._frame = Frame(values, True, windows, low=low, high=high)
        self._rgb = image
        super().__init__(name, facts, PatientIdentity(), self._frame.windows, self._frame.monochrome)

    def _shown(self, index: int, frame: Frame, window: Window | None) -> NDArray[np.uint8]:
        # Not through the window that means the same: training saw load_image's pixels, to the last rounding.
        return np.array(self._rgb) if window is None else apply_window(frame.values, window)

    def frame(self, index: int) -> Frame:
        if index != 0:
            raise ImageError(f"Expected frame 0 of {self.name}, found {index}.", "Of a file that is not DICOM only the first is read.")
        return self._frame


class DicomPicture(Picture):
    """A DICOM file, described by the decoding process."""

    def __init__(self, data: bytes, name: str) -> None:
        self._data, self._token = data, object()
        header = client.load(data, name, self._token)
        width, height, told = _square(header.columns, header.rows, header.aspect)
        said = header.facts
        facts = ImageFacts(
            "dicom",
            width,
            height,
            header.frames,
            said["modality"],
            said["body_part"],
            said["view_position"],
            said["laterality"],
            warnings=header.warnings + told,
        )
        windows = header.windows + (CT_WINDOWS if header.hounsfield else ())
        super().__init__(name, facts, header.identity, windows, header.monochrome)
        self.burnt_in, self.secondary, self._shape = header.burnt_in, header.secondary, (header.rows, header.columns)

    def _decode(self, index: int) -> Frame:
        frame = client.decode(self._data, self.name, index, self._token)
        if frame.values.shape[:2] != self._shape or frame.monochrome != self.monochrome:
            raise DicomError(f"Expected pixels as the header of {self.name} says, found others.", "Export the image again.")
        return frame


def open_picture(source: bytes | Path, name: str = "") -> Picture:
    """Open an image file or its bytes; what it is, is told by its content. Raises ImageError, DicomError, MissingExtraError."""
    if isinstance(source, Path):
        name = name or source.name
        source = _read(source)
    name = one_line(name) or "the image"
    if len(source) > MAX_FILE_BYTES:
        raise ImageError(f"Expected a file of at most {MAX_FILE_BYTES >> 20} MiB in {name}, found {len(source) >> 20} MiB.", "Split it.")
    return DicomPicture(source, name) if is_dicom(source) else PlainPicture(source, name)


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise ImageError(f"Expected an image at {path}, found {found_at(path, 'no such file')}.", "Check the path.")
    with os_errors(path), path.open("rb") as f:
        return f.read(MAX_FILE_BYTES + 1)


def _range(values: NDArray[np.generic]) -> tuple[float, float]:
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _square(columns: int, rows: int, aspect: float) -> tuple[int, int, tuple[str, ...]]:
    """(width, height) with square pixels, the coarser side stretched; as it is, with a warning, where that is too large."""
    width, height = (columns, round(rows * aspect)) if aspect >= 1 else (round(columns / aspect), rows)
    if abs(aspect - 1) <= 0.01:
        return columns, rows, ()
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE_PX:
        return columns, rows, ("The image is too large to be stretched to its right proportions.",)
    return width, height, ()


def _clipped(box: Box, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top = max(0, min(box.left, size[0])), max(0, min(box.top, size[1]))
    return left, top, max(left, min(box.right, size[0])), max(top, min(box.bottom, size[1]))


def strip_identifiers(data: bytes, name: str = "the image", masks: tuple[Box, ...] = (), key: bytes = b"") -> bytes:
    """A de-identified copy of a DICOM file (deidentify.py), uncompressed, with `masks` (in the rendered image's pixels) blackened.

    Files stripped with one secret `key` still belong to one study; without one, each call has its own. Raises DicomError.
    """
    picture = open_picture(data, name)
    if not isinstance(picture, DicomPicture):
        raise DicomError(f"Expected a DICOM file in {picture.name}, found a plain image.", "Plain images have no tags to remove.")
    width, height = picture.facts.width_px, picture.facts.height_px
    boxes = [_clipped(box, (width, height)) for box in masks]
    parts = [[left / width, top / height, right / width, bottom / height] for left, top, right, bottom in boxes]
    return client.strip(data, picture.name, key or secrets.token_bytes(32), parts)
