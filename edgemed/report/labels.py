"""Where labels go in a picture so that nothing lies on anything else: boxes in pixels, tried one after another.

    offsets = place_labels(anchors, sizes, obstacles, frame)

Greedy: each label takes the nearest free place around its point; where none is free, the one that covers least. Knows no matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_GAP = 4.0
_RADII = (9.0, 16.0, 26.0, 38.0, 52.0, 68.0, 90.0, 120.0)
# Right, left, above, below, then between: what a reader expects first.
_ANGLES = (0, 180, 90, 270, 35, 145, 325, 215, 60, 120, 300, 240)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def covers(self, other: Box) -> float:
        """The shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.top - self.bottom)


def place_labels(
    anchors: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], obstacles: Sequence[Box], frame: Box
) -> list[tuple[float, float]]:
    """For each label the centre of its place, in pixels. `sizes` are (width, height); `frame` is where labels must stay."""
    taken = list(obstacles)
    centres = []
    for anchor, size in zip(anchors, sizes, strict=True):
        best: tuple[float, tuple[float, float], Box] | None = None
        for centre in _places(anchor, size):
            box = _around(centre, size)
            cost = sum(box.covers(other) for other in taken) + 10 * (box.area - frame.covers(box))
            if best is None or cost < best[0]:
                best = (cost, centre, box)
            if cost <= 0:
                break
        assert best is not None
        centres.append(best[1])
        taken.append(best[2])
    return centres


def _places(anchor: tuple[float, float], size: tuple[float, float]) -> Iterator[tuple[float, float]]:
    for radius in _RADII:
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # From the point outwards by the radius, then by half of the box in that direction.
            yield anchor[0] + dx * radius + _sign(dx) * size[0] / 2, anchor[1] + dy * radius + _sign(dy) * size[1] / 2


def _sign(value: float) -> float:
    return 0.0 if abs(value) < 1e-9 else math.copysign(1.0, value)


def _around(centre: tuple[float, float], size: tuple[float, float]) -> Box:
    width, height = size[0] + _GAP, size[1] + _GAP
    return Box(centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2)
