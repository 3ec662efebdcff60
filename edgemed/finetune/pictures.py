"""The images of a training set, as a step is fed them: pixels out of memory, pixels decoded when asked for, or cached features.

    pictures = Pictures(paths, preparation)             # those that fit `preload_bytes` are decoded now, by all cores
    pictures.use_features(cache, compute)               # instead: decoded once, their features computed and memory-mapped
    pictures[path]                                      # uint8 [S, S, 3], or float [tokens, width]

`broken` tells which files could not be read, where they were looked at. Knows no text and no model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgemed.core.errors import DatasetError, EdgemedError, ImageError
from edgemed.core.files import os_errors, sha256_file
from edgemed.core.images import ImagePreparation, hash_pixels, load_image, prepare
from edgemed.finetune.features import Compute, FeatureCache, Progress

# Images decoded ahead of the tower, so that neither waits for the other.
_AHEAD = 64


class Pictures:
    """Prepared images by path."""

    def __init__(self, paths: Sequence[Path], image: ImagePreparation, preload_bytes: int) -> None:
        """All of `paths` are decoded now where they take at most `preload_bytes`, and none where they take more."""
        self.image = image
        self.paths = list(dict.fromkeys(paths))
        self.broken: dict[Path, str] = {}
        self._pixels: dict[Path, torch.Tensor] = {}
        self._features: dict[Path, str] = {}
        self._cache: FeatureCache | None = None
        if len(self.paths) * image.size_px**2 * 3 <= preload_bytes:
            for path, pixels in self._decode(self.paths):
                self._pixels[path] = torch.from_numpy(pixels)

    def use_features(self, cache: FeatureCache, compute: Compute, batch: int = 32, progress: Progress | None = None) -> int:
        """Compute the features that `cache` lacks, and hand out features from now on; how many images did not fit it."""
        left_out = cache.fill(self._keyed(cache, progress), compute, batch)
        self._cache = cache
        self._features = {path: key for path, key in self._features.items() if key in cache}
        for path in self._features:
            self._pixels.pop(path, None)
        return left_out

    @property
    def ready(self) -> bool:
        """Whether nothing has to be decoded any more: one process then loads as fast as many."""
        return len(self._pixels) + len(self._features) + len(self.broken) >= len(self.paths)

    def __getitem__(self, path: Path) -> torch.Tensor:
        """Raises ImageError, also where the file could not be read before."""
        if path in self.broken:
            raise ImageError(self.broken[path], "Export or copy the image again.")
        if self._cache is not None and path in self._features:
            return self._cache.get(self._features[path])
        if path in self._pixels:
            return self._pixels[path]
        return torch.from_numpy(prepare(load_image(path), self.image))

    def _keyed(self, cache: FeatureCache, progress: Progress | None) -> Iterator[tuple[str, str, NDArray[np.uint8]]]:
        """(file hash, pixel hash, pixels) of what the cache does not know; notes every image's pixel hash on the way."""
        unknown: dict[Path, str] = {}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for path, file_hash in zip(self.paths, pool.map(_file_hash, self.paths), strict=True):
                known = cache.known(file_hash) if file_hash else None
                if known is not None and known in cache:
                    self._features[path] = known
                else:
                    unknown[path] = file_hash or ""
        for done, (path, pixels) in enumerate(self._decode(list(unknown)), start=1):
            self._features[path] = hash_pixels(pixels)
            if progress:
                progress("Computing the tower's features", done, len(unknown))
            yield unknown[path], self._features[path], pixels

    def _decode(self, paths: Sequence[Path]) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
        """Prepared pixels in order, a few images ahead; Pillow decodes and resizes without the interpreter's lock."""
        left = iter(paths)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            waiting = [(path, pool.submit(self._prepare, path)) for path in islice(left, _AHEAD)]
            while waiting:
                path, future = waiting.pop(0)
                waiting += [(more, pool.submit(self._prepare, more)) for more in islice(left, 1)]
                pixels = future.result()
                if pixels is not None:
                    yield path, pixels

    def _prepare(self, path: Path) -> NDArray[np.uint8] | None:
        try:
            return prepare(load_image(path), self.image)
        except ImageError as error:
            self.broken[path] = error.message
            return None


def _file_hash(path: Path) -> str | None:
    try:
        with os_errors(path):
            return sha256_file(path)
    except EdgemedError:
        return None  # decoding it says why


class BrokenImages:
    """Counts the images that could not be read, by name; more than a share of all is an error."""

    def __init__(self, total: int, max_share: float) -> None:
        self.total, self.max_share = total, max_share
        self.names: set[str] = set()

    def add(self, names: Sequence[str]) -> None:
        """Raises DatasetError where there are too many."""
        self.names.update(names)
        if len(self.names) > self.max_share * self.total:
            raise DatasetError(
                f"Expected at most {self.max_share:.1%} of {self.total} images to be unreadable, found {len(self.names)}, "
                f"among them {', '.join(sorted(self.names)[:3])}.",
                "Check them with: edgemed data check",
            )
