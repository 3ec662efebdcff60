"""The static card: what a converted model needs and what it cannot exceed, before anything is measured.

card = make_card(artifact, plan)
card.ceiling_tokens_per_s        # decode at best: the device's bandwidth over the bytes each token reads
"""

from __future__ import annotations

from dataclasses import dataclass

from edgemed.core.manifest import Artifact
from runtimes import libllama
from runtimes.estimate import Item, setup_of
from runtimes.planner import Plan
from runtimes.shape import LlmShape, read_shape


@dataclass(frozen=True)
class Card:
    """Bytes. `items` are the plan's parts; `read_bytes` is what one new token reads of weights and cache at `depth` tokens."""

    items: tuple[Item, ...]
    static_bytes: dict[str, int]
    dynamic_bytes: dict[str, int]
    kv_bytes_per_token: int
    read_bytes: int
    depth: int
    bandwidth_bytes_per_s: float | None
    ceiling_tokens_per_s: float | None


def make_card(artifact: Artifact, plan: Plan, depth: int) -> Card:
    """`depth`: tokens before the one that is decoded."""
    shape, estimate, profile = read_shape(artifact, libllama.tensor_bytes), plan.estimate, plan.target.profile
    kv = 2 * (libllama.tensor_bytes(setup_of(plan.settings).kv_type, (shape.llm.kv_width, 1)) or 0) * shape.llm.layers
    read = _weights_read(shape.llm) + kv * depth
    bandwidth = profile.bandwidth_bytes_per_s.value if profile.bandwidth_bytes_per_s is not None else None
    return Card(
        items=estimate.items,
        static_bytes={place: estimate.static_bytes(place) for place in ("GPU", "CPU")},
        dynamic_bytes={place: estimate.dynamic_bytes(place) for place in ("GPU", "CPU")},
        kv_bytes_per_token=kv,
        read_bytes=read,
        depth=depth,
        bandwidth_bytes_per_s=bandwidth,
        ceiling_tokens_per_s=bandwidth / read if bandwidth else None,
    )


def _weights_read(llm: LlmShape) -> int:
    """All weights but the embedding table, of which one row is read; where it is the output layer too, it is read whole."""
    return sum(t.size_bytes for name, t in llm.tensors.items() if llm.tied or name != "token_embd.weight")
