"""Which images of a split are also in what a model was trained on, told by their pixels.

    leak = find_leaks(samples, load_samples("vqa-rad", path, "train"))
    leak.images, leak.questions, leak.of_images

An image is known by the SHA-256 of its decoded RGB pixels and their shape, so that another name, folder or lossless format hides
nothing; a copy that was scaled or saved as JPEG again is not found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edgemed.core.images import hash_pixels, load_image
from edgemed.data.samples import Sample


@dataclass(frozen=True)
class Leak:
    """Images of the split that training has too, the questions about them, and out of how many; `examples` are ids."""

    images: int
    of_images: int
    questions: int
    of_questions: int
    examples: tuple[str, ...]


def hash_image_file(path: Path) -> str:
    """A file's pixels, whatever its format. Raises ImageError."""
    pixels = np.asarray(load_image(path))
    return f"{pixels.shape}{hash_pixels(pixels)}"


def find_leaks(samples: Sequence[Sample], training: Iterable[Sample], progress: Callable[[int, int], None] | None = None) -> Leak:
    """Compare a split with training samples. Raises ImageError."""
    tested = list(dict.fromkeys(s.image for s in samples if s.image))
    trained = list(dict.fromkeys(s.image for s in training if s.image))
    total = len(tested) + len(trained)
    hashes: dict[Path, str] = {}
    for done, path in enumerate(dict.fromkeys([*trained, *tested]), 1):
        hashes[path] = hash_image_file(path)
        if progress:
            progress(done, total)
    known = {hashes[path] for path in trained}
    leaked = {path for path in tested if hashes[path] in known}
    ids = [s.id for s in samples if s.image in leaked]
    return Leak(len(leaked), len(tested), len(ids), len(samples), tuple(ids[:5]))
