"""A frozen tower's features, computed once an image and memory-mapped: no step after the first epoch runs the tower.

    cache = FeatureCache.open(folder, model, recipe.image, limit_bytes=50_000_000_000)
    compute = tower_compute(model, recipe.image)
    examples.use_features(cache, compute)       # decodes, computes what is missing; rows then carry features instead of pixels
    accept_features(model)                      # from now on the model takes what the collator made, for `pixel_values`
    model(input_ids=…, pixel_values=tower_input(batch, normalise))

A feature is the tower's hidden state at `vision_feature_layer`, class token included, as float [tokens, width], kept in the type it
was computed in: with the same batch the loss is the one without the cache. It is found by the SHA-256 of the prepared pixels, in a
folder named by the tower's weights up to that layer, the layer and the image preparation: another tower never meets these features.

    FOLDER/<tower>/features.bin   one image after another, appended
    FOLDER/<tower>/rows.txt       the pixel hash of each; a row counts once its line is whole, so that a killed run loses one batch
    FOLDER/<tower>/images.txt     file hash and pixel hash, so that a later run decodes nothing

`limit_bytes` bounds the features of all towers in FOLDER. What does not fit is computed at every step, as without a cache: every epoch
sees all images, so that throwing out old ones for new ones would miss each time. Older towers' folders make room first. Not for
recipes that move images at random or train the tower, and not for features out of several layers. Knows no recipe and no trainer.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.modeling_outputs import BaseModelOutputWithPooling

from edgemed.core.errors import RecipeError, ResourceError
from edgemed.core.filelock import FileLock
from edgemed.core.files import drop_cut_line, os_errors, whole_lines
from edgemed.core.images import ImagePreparation
from edgemed.finetune.augment import normalise_pixels

Compute = Callable[[torch.Tensor], torch.Tensor]
Progress = Callable[[str, int, int], None]
# Space that a cache leaves free on its disk, for the checkpoints.
RESERVE_BYTES = 2_000_000_000
_BUSY = ResourceError("Another edgemed is filling this feature cache.", "Wait until it has ended, or choose another folder.")


def tower_of(model: Any) -> Any:
    """The vision tower of a LlavaForConditionalGeneration, wrapped by PEFT or not."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.model.vision_tower


def _layer_of(model: Any) -> int:
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise RecipeError(f"Expected features of one layer for a cache, found the layers {layer}.", "Train without the feature cache.")
    return layer


def tower_key(model: Any, image: ImagePreparation) -> str:
    """Hex SHA-256 of what features depend on besides pixels: the tower's weights, the layer and the preparation."""
    digest = hashlib.sha256()
    digest.update(json.dumps([_layer_of(model), model.config.vision_config.to_dict(), image.model_dump()], default=str).encode())
    for name, value in sorted(tower_of(model).state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def tower_compute(model: Any, image: ImagePreparation, autocast: torch.dtype | None = None) -> Compute:
    """A function uint8 [n, S, S, 3] → features [n, tokens, width] on the CPU, computed where the tower lies.

    With `autocast` they are of that type: the projector's first layer rounds its input to it anyway, so that nothing is lost.
    """
    tower, layer = tower_of(model), _layer_of(model)

    def compute(pixels: torch.Tensor) -> torch.Tensor:
        device = next(tower.parameters()).device
        training = tower.training
        tower.eval()
        with torch.inference_mode(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            states = tower(normalise_pixels(pixels.to(device), image, None), output_hidden_states=True).hidden_states
            feature = states[layer].to(autocast or states[layer].dtype).cpu()
        tower.train(training)
        return feature

    return compute


class FeatureCache:
    """Features by pixel hash. Reading is safe in any number of processes; filling is one process's at a time, the others wait."""

    def __init__(self, folder: Path, shape: tuple[int, int], dtype: torch.dtype, limit_bytes: int) -> None:
        """`folder` is one tower's own; `shape` is (tokens, width)."""
        self.folder, self.shape, self.dtype = folder, shape, dtype
        self.row_bytes = shape[0] * shape[1] * dtype.itemsize
        self.limit_rows = limit_bytes // self.row_bytes
        self._map: NDArray[np.uint8] | None = None
        with os_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(folder / ".lock", _BUSY)
        self._load()

    @classmethod
    def open(cls, folder: Path, model: Any, image: ImagePreparation, limit_bytes: int, autocast: torch.dtype | None = None) -> FeatureCache:
        """The cache of `model`'s tower in `folder`. `autocast` is the type the tower computes in on the GPU (bfloat16), if any."""
        size = image.size_px
        probe = tower_compute(model, image, autocast)(torch.zeros(1, size, size, 3, dtype=torch.uint8))
        own = folder / f"{tower_key(model, image)[:24]}-{str(probe.dtype).removeprefix('torch.')}{'-autocast' if autocast else ''}"
        room = limit_bytes - _make_room(folder, own, limit_bytes)
        return cls(own, (probe.shape[1], probe.shape[2]), probe.dtype, max(0, room))

    @property
    def _data(self) -> Path:
        return self.folder / "features.bin"

    def _load(self) -> None:
        """Read which rows are whole. A last line that was cut, and bytes without a line, belong to a killed run."""
        self._rows = {line: i for i, line in enumerate(whole_lines(self.folder / "rows.txt"))}
        pairs = (line.split() for line in whole_lines(self.folder / "images.txt"))
        self._images = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
        have = self._data.stat().st_size // self.row_bytes if self._data.is_file() else 0
        if have < len(self._rows):
            raise ResourceError(
                f"Expected {len(self._rows)} features in {self._data}, found {have}.",
                "Delete this folder; its features are computed again.",
            )
        self._map = None

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, pixel_hash: str) -> bool:
        return pixel_hash in self._rows

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None, "_lock": None}  # a data loader's worker maps the file itself, and never fills

    def get(self, pixel_hash: str) -> torch.Tensor:
        """The feature [tokens, width], read from the map (a copy). Raises KeyError where it is not here."""
        row = self._rows[pixel_hash]
        if self._map is None or row >= len(self._map):
            self._map = np.memmap(self._data, np.uint8, "r", shape=(len(self._rows), self.row_bytes))
        return torch.from_numpy(np.array(self._map[row])).view(self.dtype).reshape(self.shape)

    def known(self, file_hash: str) -> str | None:
        """The pixel hash of an image file that an earlier run prepared, by the file's SHA-256."""
        return self._images.get(file_hash)

    def fill(self, images: Iterable[tuple[str, str, NDArray[np.uint8]]], compute: Compute, batch: int = 32) -> int:
        """Compute what is missing of (file hash, pixel hash, uint8 [S, S, 3]); returns how many did not fit.

        Images are taken from the iterable a batch at a time. Raises ResourceError where the disk is full.
        """
        self._lock.wait()
        left_out = 0
        try:
            for name in ("rows.txt", "images.txt"):
                drop_cut_line(self.folder / name)
            self._load()
            waiting: dict[str, NDArray[np.uint8]] = {}
            seen: list[tuple[str, str]] = []
            for file_hash, pixel_hash, pixels in images:
                seen.append((file_hash, pixel_hash))
                if pixel_hash not in self._rows and pixel_hash not in waiting:
                    if len(self._rows) + len(waiting) < self._capacity():
                        waiting[pixel_hash] = pixels
                    else:
                        left_out += 1
                if len(waiting) == batch or len(seen) == 8 * batch:
                    self._append(waiting, seen, compute)
                    waiting, seen = {}, []
            self._append(waiting, seen, compute)
        finally:
            self._lock.release()
        return left_out

    def _capacity(self) -> int:
        """Rows that may be here at the end: by the limit, and by what the disk has beside the reserve."""
        free = shutil.disk_usage(self.folder).free - RESERVE_BYTES
        return int(min(self.limit_rows, len(self._rows) + max(0, free) // self.row_bytes))

    def _append(self, waiting: dict[str, NDArray[np.uint8]], seen: Sequence[tuple[str, str]], compute: Compute) -> None:
        if waiting:
            features = compute(torch.from_numpy(np.stack(list(waiting.values())))).to(self.dtype).contiguous()
            with os_errors(self._data), open(self._data, "r+b" if self._data.exists() else "w+b") as f:
                f.seek(len(self._rows) * self.row_bytes)  # over what a killed run left without a line
                f.write(features.view(torch.uint8).numpy().data)
                f.truncate()
                f.flush()
                os.fsync(f.fileno())
            _append_lines(self.folder / "rows.txt", list(waiting))
            for pixel_hash in waiting:
                self._rows[pixel_hash] = len(self._rows)
        new = {a: b for a, b in seen if self._images.get(a) != b}
        if new:
            _append_lines(self.folder / "images.txt", [f"{a} {b}" for a, b in new.items()])
            self._images |= new


def _append_lines(path: Path, lines: Sequence[str]) -> None:
    with os_errors(path), open(path, "ab") as f:
        f.write("".join(f"{line}\n" for line in lines).encode())
        f.flush()
        os.fsync(f.fileno())


def _make_room(folder: Path, own: Path, limit_bytes: int) -> int:
    """Remove other towers' folders, least recently used first, until they take at most half the limit; what they take then."""
    others = [d for d in folder.iterdir() if d.is_dir() and d != own] if folder.is_dir() else []
    sizes = {d: sum(f.stat().st_size for f in d.iterdir()) for d in others if (d / "rows.txt").is_file()}
    for old in sorted(sizes, key=lambda d: (d / "rows.txt").stat().st_mtime):
        if sum(sizes.values()) <= limit_bytes // 2:
            break
        lock = FileLock(old / ".lock", _BUSY)
        try:
            lock.acquire()
        except ResourceError:
            continue
        lock.release()
        shutil.rmtree(old, ignore_errors=True)
        del sizes[old]
    return sum(sizes.values())


def accept_features(model: Any) -> None:
    """Let the model take `tower_input`'s triple for `pixel_values`. The module tree, names and weights stay as they are."""
    tower = tower_of(model)
    run = tower.forward

    def forward(pixel_values: Any, **kwargs: Any) -> Any:
        if isinstance(pixel_values, torch.Tensor):
            return run(pixel_values, **kwargs)
        features, pixels, order = pixel_values
        states = [features.to(next(tower.parameters()).dtype)] if features is not None else []
        if pixels is not None:
            kwargs.pop("output_hidden_states", None)
            with torch.no_grad():
                states.append(run(pixels, output_hidden_states=True, **kwargs).hidden_states[_layer_of(model)])
        state = torch.cat(states)[order]
        return BaseModelOutputWithPooling(hidden_states=_SameLayer(state))

    tower.forward = forward


class _SameLayer:
    """Hidden states of which only the wanted layer is there, whichever number it is asked by."""

    def __init__(self, state: torch.Tensor) -> None:
        self.state = state

    def __getitem__(self, layer: int) -> torch.Tensor:
        return self.state


def tower_input(batch: dict[str, Any], normalise: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """What goes in for `pixel_values`; takes "pixels", "features" and "order" out of a collator's batch. None: no image in it.

    Without features it is the normalised pixels [n, 3, S, S], else (features, pixels or None, order): the image i of the batch is
    row order[i] of features and then pixels.
    """
    pixels, features, order = (batch.pop(name, None) for name in ("pixels", "features", "order"))
    shown = normalise(pixels) if pixels is not None else None
    return shown if features is None else (features, shown, order)


def take_images(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """ "pixels", "features" and "order" of the images `start` to `stop` of a collator's batch, as far as there are any."""
    pixels, features, order = (batch.get(name) for name in ("pixels", "features", "order"))
    if features is None or order is None:
        return {"pixels": pixels[start:stop]} if pixels is not None and stop > start else {}
    rows = order[start:stop]
    cached, fresh = rows[rows < len(features)], rows[rows >= len(features)] - len(features)
    if not len(cached):
        return {"pixels": pixels[fresh]} if pixels is not None and len(fresh) else {}
    place = torch.argsort(torch.argsort(rows))  # ranks: features come before pixels, both in the order of their images
    out = {"features": features[cached], "order": place}
    return out | ({"pixels": pixels[fresh]} if pixels is not None and len(fresh) else {})
