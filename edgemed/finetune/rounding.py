"""Fine-tuning that knows what 4 bits will do to the weights.

A linear layer with an adapter computes x·(W + s·B·A). Converted to 4 bits it computes x·Q(W + s·B·A). Here the frozen W is replaced,
for a few steps at a time, by W + E with E = Q(W + s·B·A) − (W + s·B·A), so that training sees the rounded layer at the price of the
plain one and its gradient goes straight through the rounding. The idea is that of quantisation noise (Fan et al. 2020,
arXiv:2004.07320). Q is what the 4-bit recipe does to a model whose rows fill no block of 256: IQ4_NL with ggml's own search for the
scale (quantize_row_iq4_nl_impl without importance), Q5_0 for embeddings; value projections and the first layers' way up into the
feed-forward, which that recipe keeps at 8 bits, stay exact. It must be the converter's very rounding: an adapter that learnt to live
with the errors of a coarser search, or of other types, lost most of the gain in the converted file (docs/LOG.md, 2026-11-22 and 28).
So edgemed.json says of such a checkpoint that it is `rounded`, and the converter takes these types for it, whatever its rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

BLOCK = 32
LEVELS = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
TRIES = 7
# GROUP_MAX_EPS of ggml-quants.c: smaller blocks are zeros.
SMALLEST = 1e-15
# Values that are rounded at once: small matrices together, or starting the GPU's programs would take longer than they do.
CHUNK_VALUES = 1 << 24


def round_to_levels(weight: torch.Tensor) -> torch.Tensor:
    """float [rows, columns] → the same as IQ4_NL reads it back, by blocks of 32 columns. Columns: a multiple of 32."""
    return _round_blocks(weight.float().reshape(-1, BLOCK)).reshape(weight.shape)


def _round_blocks(x: torch.Tensor) -> torch.Tensor:
    """float32 [n, 32] → the same: of 16 scales around the largest value's, the one of least error weighted by x²."""
    levels = torch.tensor(LEVELS, device=x.device)
    middles = (levels[1:] + levels[:-1]) / 2

    def nearest(inverse: torch.Tensor) -> torch.Tensor:
        return levels[torch.bucketize(x * inverse, middles, out_int32=True, right=True)]

    largest = x.gather(1, x.abs().argmax(1, keepdim=True))
    empty = largest.abs() < SMALLEST
    largest = torch.where(empty, 1.0, largest)
    weighted = x * x
    products = weighted * x
    scale = best = torch.zeros_like(largest)
    for number, inverse in enumerate([-levels[0] / largest, *((step + levels[0]) / largest for step in range(-TRIES, TRIES + 1))]):
        q = nearest(inverse)
        qx, q2 = (products * q).sum(1, keepdim=True), (weighted * q * q).sum(1, keepdim=True)
        better = (q2 > 0) & ((qx * qx > best * q2) | (number == 0))
        fitted = qx / torch.where(q2 > 0, q2, 1.0)
        scale, best = torch.where(better, fitted, scale), torch.where(better, fitted * qx, best)
    empty = empty | (scale == 0)
    return torch.where(empty, 0.0, nearest(1 / torch.where(empty, 1.0, scale)) * scale.half().float())


def round_to_5_bits(weight: torch.Tensor) -> torch.Tensor:
    """float [rows, columns] → the same as Q5_0 reads it back (quantize_row_q5_0_ref)."""
    x = weight.float().reshape(-1, BLOCK)
    scale = x.gather(1, x.abs().argmax(1, keepdim=True)) / -16
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    levels = (x * inverse + 16.5).floor().clamp(max=31) - 16
    return (levels * scale.half().float()).reshape(weight.shape)


def _stays_exact(name: str, layers: int) -> bool:
    """By a module's name: what the recipe keeps at 8 bits."""
    match = re.search(r"layers\.(\d+)\..*\.(v_proj|up_proj)$", name)
    return match is not None and (match[2] == "v_proj" or int(match[1]) < layers // 8)


class LoraRounding:
    """The adapted layers of a PEFT model and its embeddings, and their exact frozen weights."""

    def __init__(self, model: Any) -> None:
        found = [(n, m) for n, m in model.named_modules() if hasattr(m, "lora_A") and hasattr(m, "get_base_layer")]
        layers = 1 + max((int(k[1]) for n, _ in found if (k := re.search(r"layers\.(\d+)\.", n))), default=0)
        self.layers = [
            (module, module.get_base_layer().weight.detach().clone())
            for name, module in found
            if not _stays_exact(name, layers) and module.get_base_layer().weight.shape[1] % BLOCK == 0
        ]
        embeddings = model.get_input_embeddings().weight
        fits = embeddings.shape[1] % BLOCK == 0 and not embeddings.requires_grad
        self.embeddings = (embeddings, embeddings.detach().clone()) if fits else None

    @torch.no_grad()
    def apply(self, rounded: bool) -> None:
        """Set every layer's frozen weight to carry its rounding error, as the adapter stands now, or to be exact."""
        self.layers = [(module, exact.to(module.get_base_layer().weight.device)) for module, exact in self.layers]
        if self.embeddings is not None:
            weight, exact = self.embeddings
            exact = exact.to(weight.device)
            weight.copy_(round_to_5_bits(exact) if rounded else exact)
            self.embeddings = weight, exact
        if not rounded:
            for module, exact in self.layers:
                module.get_base_layer().weight.copy_(exact)
            return
        for group in _groups([exact.numel() for _, exact in self.layers]):
            deltas = [self.layers[i][0].get_delta_weight("default").float() for i in group]
            merged = [self.layers[i][1].float() + delta for i, delta in zip(group, deltas, strict=True)]
            done = _round_blocks(torch.cat([m.reshape(-1, BLOCK) for m in merged]))
            parts = done.split([m.numel() // BLOCK for m in merged])
            for i, delta, part in zip(group, deltas, parts, strict=True):
                self.layers[i][0].get_base_layer().weight.copy_(part.reshape(delta.shape) - delta)


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Indices, in order, of at most CHUNK_VALUES together (one at least)."""
    group: list[int] = []
    for index, size in enumerate(sizes):
        if group and sum(sizes[i] for i in group) + size > CHUNK_VALUES:
            yield group
            group = []
        group.append(index)
    if group:
        yield group
