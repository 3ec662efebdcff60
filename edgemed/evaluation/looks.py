"""Does the model look? The same questions with an image that should change the answers.

    picture = show(path, "mirrored")             # PIL image, or None for "blank": the target shows its padding colour
    donors = swap_images(paths)                  # path → another image's path

shown: the image; blank: one colour; mirrored: left and right exchanged; swapped: an image from the other half of the set. Knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from edgemed.core.images import load_image

if TYPE_CHECKING:
    from PIL.Image import Image

View = Literal["shown", "blank", "mirrored", "swapped"]
VIEWS: tuple[View, ...] = get_args(View)


def swap_images(paths: Sequence[Path]) -> dict[Path, Path]:
    """For each image another one, half of the list further on, so that series of like images are left; itself where it is the only one."""
    images = list(dict.fromkeys(paths))
    return {path: images[(k + max(1, len(images) // 2)) % len(images)] for k, path in enumerate(images)}


def show(path: Path, view: View, donor: Path | None = None) -> Image | None:
    """What is put before the model, as RGB; None for a blank. Raises ImageError."""
    if view == "blank":
        return None
    if view == "swapped":
        return load_image(donor or path)
    from PIL import ImageOps

    image = load_image(path)
    return ImageOps.mirror(image) if view == "mirrored" else image
