"""Where labels go in a picture so that nothing lies on anything else: boxes in pixels, tried one after another.

    centres = place_labels(anchors, sizes, obstacles, frame)

Greedy: each label takes the place around its point that costs least: first that it covers nothing, then that the line which leads to it
crosses neither labels nor lines, then that it is near. Knows no matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

_GAP = 4.0
_RADII = (9.0, 16.0, 26.0, 38.0, 52.0, 68.0, 90.0, 120.0)
# Right, left, above, below, then between: what a reader expects first.
_ANGLES = (0, 180, 90, 270, 35, 145, 325, 215, 60, 120, 300, 240)
# Costs: a pixel covered, a pixel outside the frame, a line over a label or another line, a line over an obstacle, a pixel of distance.
_COVERED, _OUTSIDE, _CROSSED, _TOUCHED, _DISTANCE = 100.0, 1000.0, 300.0, 10.0, 1.0
_STEP_PX = 3.0


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

    def holds(self, point: Point) -> bool:
        """Whether the point lies in it."""
        return self.left <= point[0] <= self.right and self.bottom <= point[1] <= self.top

    def nearest(self, point: Point) -> Point:
        """Its point that is nearest to another."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.bottom), self.top)

    @property
    def area(self) -> float:
        return (self.right - self.left) * (self.top - self.bottom)


def place_labels(anchors: Sequence[Point], sizes: Sequence[Point], obstacles: Sequence[Box], frame: Box) -> list[Point]:
    """For each label the centre of its place, in pixels. `sizes` are (width, height); `frame` is where labels must stay."""
    centres: list[Point] = []
    placed: list[Box] = []
    lines: list[list[Point]] = []
    for anchor, size in zip(anchors, sizes, strict=True):

        def cost(centre: Point, anchor: Point = anchor, size: Point = size) -> float:
            box = _around(centre, size)
            covered = sum(box.covers(other) for other in [*obstacles, *placed])
            line = _line(anchor, box)
            crossed = sum(any(map(other.holds, line)) for other in placed) + sum(_meet(line, other) for other in lines)
            # A line may begin in its own point's box.
            touched = sum(any(map(other.holds, line)) for other in obstacles if not other.holds(anchor))
            outside = box.area - frame.covers(box)
            near = _DISTANCE * math.dist(anchor, box.nearest(anchor))
            return _COVERED * covered + _OUTSIDE * outside + _CROSSED * crossed + _TOUCHED * touched + near

        best = min(_places(anchor, size), key=cost)
        centres.append(best)
        placed.append(_around(best, size))
        lines.append(_line(anchor, placed[-1]))
    return centres


def _places(anchor: Point, size: Point) -> Iterator[Point]:
    for radius in _RADII:
        for angle in _ANGLES:
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            # From the point outwards by the radius, then by half of the box in that direction.
            yield anchor[0] + dx * radius + _sign(dx) * size[0] / 2, anchor[1] + dy * radius + _sign(dy) * size[1] / 2


def _sign(value: float) -> float:
    return 0.0 if abs(value) < 1e-9 else math.copysign(1.0, value)


def _around(centre: Point, size: Point) -> Box:
    width, height = size[0] + _GAP, size[1] + _GAP
    return Box(centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2)


def _line(anchor: Point, box: Box) -> list[Point]:
    """Points along the line from a label's point to its box, without its ends."""
    end = box.nearest(anchor)
    steps = int(math.dist(anchor, end) / _STEP_PX)
    return [(anchor[0] + (end[0] - anchor[0]) * i / steps, anchor[1] + (end[1] - anchor[1]) * i / steps) for i in range(1, steps)]


def _meet(one: Sequence[Point], other: Sequence[Point]) -> bool:
    return any(math.dist(a, b) < _STEP_PX for a in one for b in other)
