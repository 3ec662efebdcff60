"""Stand-ins for edgemed.clinic.imaging.Picture: small grey or coloured frames in memory, windowed as a picture does it."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from edgemed.clinic.records import ImageFacts, View, Window
from edgemed.core.errors import DicomError

LUNG, SOFT = Window(-600, 1500, name="lung"), Window(40, 400, name="soft\x1b[31m tissue")


def ramp(width: int, height: int, low: float = -1000, high: float = 1000) -> np.ndarray:
    """Darker left, brighter right."""
    return np.tile(np.linspace(low, high, width), (height, 1))


@dataclass(eq=False)
class FakePicture:
    """A monochrome picture of float frames; `gate`, when given, holds back every rendering until it is set."""

    frames: list[np.ndarray] = field(default_factory=lambda: [ramp(64, 48)])
    name: str = "chest.dcm"
    monochrome: bool = True
    windows: tuple[Window, ...] = (SOFT, LUNG)
    gate: threading.Event | None = None
    broken: bool = False
    rendered: list[View] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    @property
    def facts(self) -> ImageFacts:
        height, width = self.frames[0].shape[:2]
        return ImageFacts("dicom", width, height, frames=len(self.frames))

    def default_window(self, frame: int = 0) -> Window | None:
        self.threads.add(threading.get_ident())
        return self.windows[0] if self.monochrome else None

    def render(self, view: View = View()) -> Image.Image:  # noqa: B008
        self.threads.add(threading.get_ident())
        if self.gate is not None:
            assert self.gate.wait(30)
        self.rendered.append(view)
        if self.broken:
            raise DicomError("Expected pixel data in \x1b]0;evil\x07chest.dcm, found none.", "Export it again.")
        values = self.frames[view.frame]
        if self.monochrome:
            window = view.window or self.windows[0]
            values = np.clip((values - window.centre) / window.width + 0.5, 0, 1) * 255
        pixels = values.astype(np.uint8)
        image = Image.fromarray(255 - pixels if view.invert else pixels).convert("RGB")
        for box in view.masks:
            image.paste((0, 0, 0), (box.left, box.top, box.right, box.bottom))
        return image
