"""Prepared pixels → what a tower is fed, on the device: normalised, and in training slightly moved where the recipe says so."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from edgemed.core.images import ImagePreparation
from edgemed.finetune.recipe import OptimRecipe


def normalise_pixels(pixels: torch.Tensor, image: ImagePreparation, moved: OptimRecipe | None) -> torch.Tensor:
    """uint8 [n, S, S, 3] → float32 [n, 3, S, S], (x / 255 − mean) / std; first moved at random by `moved`, where given."""
    x = pixels.permute(0, 3, 1, 2).float() / 255.0
    if moved is not None:
        x = move_images(change_light(x, moved), moved, _colour(image.pad_colour, x.device) / 255.0)
    return (x - _colour(image.mean, x.device)) / _colour(image.std, x.device)


@functools.lru_cache
def _colour(values: Sequence[float], device: torch.device) -> torch.Tensor:
    """float [1, 3, 1, 1]; kept, since a GPU that is sent something new has to finish all that it was given before."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def change_light(x: torch.Tensor, optim: OptimRecipe) -> torch.Tensor:
    """float [n, 3, S, S] in 0…1 → the same, each image's brightness and contrast (about its own mean) changed at random; black stays black,
    so that black padding and the air around a body do."""
    if not (optim.brightness or optim.contrast):
        return x
    n = x.shape[0]
    more, steeper = ((torch.rand(n, 1, 1, 1, device=x.device) * 2 - 1) * limit for limit in (optim.brightness, optim.contrast))
    mean = x.mean((1, 2, 3), keepdim=True)
    changed = (x - mean) * (1 + steeper) + mean + more
    return torch.where((x > 0).any(1, keepdim=True), changed.clamp(0, 1), x)


def move_images(x: torch.Tensor, optim: OptimRecipe, fill: torch.Tensor) -> torch.Tensor:
    """float [n, 3, S, S] → the same, each image rotated, scaled and shifted at random within the recipe; outside is `fill` [1, 3, 1, 1]."""
    if not (optim.rotate_deg or optim.scale or optim.shift):
        return x
    n = x.shape[0]

    def uniform(limit: float) -> torch.Tensor:
        return (torch.rand(n, device=x.device) * 2 - 1) * limit

    angle, zoom = uniform(math.radians(optim.rotate_deg)), 1 + uniform(optim.scale)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    theta = torch.stack([torch.stack([cos, -sin, uniform(2 * optim.shift)], 1), torch.stack([sin, cos, uniform(2 * optim.shift)], 1)], 1)
    grid = torch.nn.functional.affine_grid(theta, list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x - fill, grid, align_corners=False) + fill
