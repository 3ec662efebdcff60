"""Fine-tuning that knows what 4 bits will do to the weights.

A linear layer with an adapter computes x·(W + s·B·A). Converted to 4 bits it computes x·Q(W + s·B·A). Here the frozen W is replaced,
for a few steps at a time, by W + E with E = Q(W + s·B·A) − (W + s·B·A), so that training sees the rounded layer at the price of the
plain one and its gradient goes straight through the rounding. The idea is that of quantisation noise (Fan et al. 2020,
arXiv:2004.07320). Q is IQ4_NL's levels with the scale of a block's largest value (kvalues_iq4nl of ggml-common.h), a little coarser
than ggml's search for the scale; the value projections, which the 4-bit recipe keeps at 8 bits, stay exact.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 32
LEVELS = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
EXACT = ("v_proj",)


def round_to_levels(weight: torch.Tensor) -> torch.Tensor:
    """float [rows, columns] → the same, each block of 32 columns rounded to 16 levels times its scale. Columns: a multiple of 32."""
    levels = torch.tensor(LEVELS, device=weight.device)
    blocks = weight.float().reshape(-1, BLOCK)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    scale = largest / levels[0]
    ratios = torch.where(scale == 0, 0.0, blocks / scale)
    nearest = torch.bucketize(ratios, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).reshape(weight.shape)


class LoraRounding:
    """The adapted layers of a PEFT model, and their exact frozen weights."""

    def __init__(self, model: Any) -> None:
        self.layers = [
            (module, module.get_base_layer().weight.detach().clone())
            for name, module in model.named_modules()
            if hasattr(module, "lora_A") and hasattr(module, "get_base_layer") and name.rsplit(".", 1)[-1] not in EXACT
        ]
        self.layers = [(module, exact) for module, exact in self.layers if exact.shape[1] % BLOCK == 0]

    @torch.no_grad()
    def apply(self, rounded: bool) -> None:
        """Set every layer's frozen weight to carry its rounding error, as the adapter stands now, or to be exact."""
        for i, (module, exact) in enumerate(self.layers):
            weight = module.get_base_layer().weight
            if exact.device != weight.device:
                exact = exact.to(weight.device)
                self.layers[i] = (module, exact)
            if not rounded:
                weight.copy_(exact)
                continue
            delta = module.get_delta_weight("default").float()
            merged = exact.float() + delta
            weight.copy_(round_to_levels(merged) - delta)
