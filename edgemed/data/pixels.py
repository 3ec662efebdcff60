"""Which images are the same: a hash of decoded pixels, and leakage between splits by it.

    hashes = {path: found for path, found in hash_images(paths) if isinstance(found, str)}
    find_leaks({"slake train": hashes, "slake validate": …})

Two files count as one image where they decode to the same pixels, whatever their names, formats without loss and EXIF data say.
An image that was scaled or saved as JPEG again differs, and is not found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from edgemed.core.errors import ImageError
from edgemed.core.images import load_image

# Decoded images that wait to be hashed: more only take memory.
_AHEAD = 32


def hash_image(path: Path) -> str:
    """Hex SHA-256 of width, height and upright RGB pixels. Raises ImageError."""
    image = load_image(path)
    digest = hashlib.sha256(f"{image.width} {image.height} ".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.hexdigest()


def hash_images(paths: Iterable[Path]) -> Iterator[tuple[Path, str | ImageError | None]]:
    """(path, hash, the error of a broken image, or None for a missing one) in order; Pillow decodes on all cores."""
    left = iter(dict.fromkeys(paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: list[tuple[Path, Future[str | ImageError | None]]] = [(p, pool.submit(_try_hash, p)) for p in islice(left, _AHEAD)]
        while waiting:
            path, future = waiting.pop(0)
            waiting += [(p, pool.submit(_try_hash, p)) for p in islice(left, 1)]
            yield path, future.result()


def _try_hash(path: Path) -> str | ImageError | None:
    if not path.is_file():
        return None
    try:
        return hash_image(path)
    except ImageError as error:
        return error


@dataclass(frozen=True)
class Leak:
    """Images that two splits share: `pairs` of (path in first, path in second)."""

    first: str
    second: str
    pairs: tuple[tuple[Path, Path], ...]


def find_leaks(splits: Mapping[str, Mapping[Path, str]]) -> list[Leak]:
    """Every two of the named splits ({path: hash}) that share images; one pair for each image that is shared."""
    by_hash = {name: {digest: path for path, digest in hashes.items()} for name, hashes in splits.items()}
    names = list(splits)
    out = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            shared = sorted(by_hash[first].keys() & by_hash[second].keys())
            if shared:
                out.append(Leak(first, second, tuple((by_hash[first][d], by_hash[second][d]) for d in shared)))
    return out
