"""The rectangle that a person places over burnt-in text: moved, sized and kept within the image. Values only, no screen."""

from __future__ import annotations

from dataclasses import dataclass, replace

from edgemed.clinic.records import Box


@dataclass(frozen=True)
class MaskTool:
    """The rectangle under the keys, in the image's own pixels. `index`: which mask of the view it is, None for a new one."""

    image: tuple[int, int]
    box: Box
    index: int | None = None

    @classmethod
    def at(cls, image: tuple[int, int], left: float, top: float, right: float, bottom: float) -> MaskTool:
        """A new rectangle with these corners, in any order, cut to the image."""
        x0, x1 = sorted((round(left), round(right)))
        y0, y1 = sorted((round(top), round(bottom)))
        x0, y0 = min(max(x0, 0), image[0] - 1), min(max(y0, 0), image[1] - 1)
        return cls(image, Box(x0, y0, min(max(x1, x0 + 1), image[0]), min(max(y1, y0 + 1), image[1])))

    def moved(self, right: int, down: int) -> MaskTool:
        box = self.box
        dx = min(max(right, -box.left), self.image[0] - box.right)
        dy = min(max(down, -box.top), self.image[1] - box.bottom)
        return replace(self, box=Box(box.left + dx, box.top + dy, box.right + dx, box.bottom + dy))

    def sized(self, right: int, down: int) -> MaskTool:
        """The right and bottom edges moved; at least one pixel stays."""
        box = self.box
        return replace(
            self,
            box=replace(
                box,
                right=min(max(box.right + right, box.left + 1), self.image[0]),
                bottom=min(max(box.bottom + down, box.top + 1), self.image[1]),
            ),
        )

    def fixed(self, masks: tuple[Box, ...]) -> tuple[Box, ...]:
        """The view's masks with this one in its place, or added."""
        if self.index is None:
            return (*masks, self.box) if self.box not in masks else masks
        return (*masks[: self.index], self.box, *masks[self.index + 1 :])

    def removed(self, masks: tuple[Box, ...]) -> tuple[Box, ...]:
        """The view's masks without this one."""
        return masks if self.index is None else (*masks[: self.index], *masks[self.index + 1 :])

    def next(self, masks: tuple[Box, ...]) -> MaskTool:
        """The view's next mask under the keys, after the last one the first again."""
        if not masks:
            return self
        index = 0 if self.index is None else (self.index + 1) % len(masks)
        return replace(self, box=masks[index], index=index)
