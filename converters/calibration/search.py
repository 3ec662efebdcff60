"""Which type each matrix gets, so that the answers change least in so many bytes.

    losses = measure_losses(planned, threads)                   # name → type → nats, from rows of each rounded for real
    types = choose_types(shapes, losses, budget_bytes)          # name → type

Some rows of each matrix are rounded to each type that they fit; what such errors do to the answers is told by the calibration's
moments (fit.py, second order). The best mixture under a budget is that of a price for a byte (Lagrange), with what is
left of the budget spent on the upgrades that gain most for a byte. Knows nothing of torch; the same input gives the same mixture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from converters.calibration.fit import Fit
from converters.ggml import block_size, needs_importance, prepare, row_bytes
from converters.quantise import Planned
from edgemed.core.errors import RecipeError
from edgemed.core.units import format_bytes

# What a matrix may become.
CANDIDATES = (
    Type.Q2_K, Type.Q3_K, Type.IQ4_XS, Type.IQ4_NL, Type.Q4_K, Type.Q4_1, Type.Q5_0, Type.Q5_K, Type.Q5_1, Type.Q6_K, Type.Q8_0, Type.F16,
)  # fmt: skip
# Only where a budget cannot be met without them: too coarse for images and questions unlike those that were seen.
LAST_RESORT = (Type.Q2_K, Type.Q3_K)
# Rows of each matrix that are rounded to tell its losses: the heaviest, and as many spread over the rest.
SAMPLE_ROWS = 64
Losses = Mapping[str, Mapping[Type, float]]
Progress = Callable[[int, int], None]


def candidates(width: int) -> list[Type]:
    """Types whose blocks rows of this width fill."""
    return [kind for kind in CANDIDATES if width % block_size(kind) == 0 and not needs_importance(kind)]


def measure_losses(tensors: Sequence[Planned], threads: int, progress: Progress | None = None) -> dict[str, dict[Type, float]]:
    """The loss of each tensor that has a fit, in nats an answer position, under each type it can have."""
    for kind in CANDIDATES:
        prepare(kind)
    fitted = [tensor for tensor in tensors if tensor.fit is not None]
    out: dict[str, dict[Type, float]] = {}
    with ThreadPoolExecutor(threads, thread_name_prefix="search") as pool:
        for done, (tensor, losses) in enumerate(zip(fitted, pool.map(_tensor_losses, fitted), strict=True), start=1):
            out[tensor.name] = losses
            if progress:
                progress(done, len(fitted))
    return out


def _tensor_losses(tensor: Planned) -> dict[Type, float]:
    assert tensor.fit is not None
    at = _sample(tensor.fit, tensor.shape[0])
    rows = np.concatenate([tensor.source.read(int(i), int(i) + 1) for i in at])
    return {kind: tensor.fit.expected_loss(kind, rows, at) for kind in candidates(tensor.shape[-1])}


def _sample(fit: Fit, rows: int) -> NDArray[np.intp]:
    if rows <= 2 * SAMPLE_ROWS:
        return np.arange(rows)
    weights = fit.row_weights
    if fit.moments.rows is not None and fit.moments.rows.sum() > 0:
        weights = weights + fit.moments.rows / fit.moments.rows.sum()
    heavy = np.argsort(-weights, kind="stable")[:SAMPLE_ROWS]
    return np.unique(np.concatenate([heavy, np.linspace(0, rows - 1, SAMPLE_ROWS).astype(np.intp)]))


def choose_types(shapes: Mapping[str, tuple[int, ...]], losses: Losses, budget_bytes: int, fixed_bytes: int = 0) -> dict[str, Type]:
    """The mixture with the least summed loss whose matrices and `fixed_bytes` take at most `budget_bytes`.

    Raises RecipeError where none does, which names the smallest size that one has.
    """
    fine = {name: {k: v for k, v in kinds.items() if k not in LAST_RESORT} for name, kinds in losses.items()}
    options = {name: _hull(shapes[name], kinds) for name, kinds in fine.items()}
    if fixed_bytes + sum(hull[0][0] for hull in options.values()) > budget_bytes:
        options = {name: _hull(shapes[name], kinds) for name, kinds in losses.items()}
    chosen = {name: 0 for name in options}
    used = fixed_bytes + sum(hull[0][0] for hull in options.values())
    if used > budget_bytes:
        raise RecipeError(
            f"Expected a budget of at least {used} bytes ({format_bytes(used)}), the smallest size of this model, found {budget_bytes}.",
            f"Pass --budget {used} or more.",
        )
    # Along the hulls the gain of a byte falls, so that taking the best upgrade each time is the price's solution.
    steps = sorted(
        ((low[1] - high[1]) / (high[0] - low[0]), name, i + 1)
        for name, hull in options.items()
        for i, (low, high) in enumerate(zip(hull, hull[1:], strict=False))
    )
    for _, name, i in reversed(steps):
        more = options[name][i][0] - options[name][chosen[name]][0]
        if i == chosen[name] + 1 and used + more <= budget_bytes:
            used += more
            chosen[name] = i
    return {name: options[name][i][2] for name, i in chosen.items()}


def _hull(shape: tuple[int, ...], losses: Mapping[Type, float]) -> list[tuple[int, float, Type]]:
    """(bytes, loss, type) of the types worth their bytes, growing: the lower convex hull."""
    rows = prod(shape[:-1])
    points = sorted((rows * row_bytes(kind, shape[-1]), loss, kind) for kind, loss in losses.items())
    hull: list[tuple[int, float, Type]] = []
    for point in points:
        if hull and point[1] >= hull[-1][1]:
            continue  # no better than a smaller one
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(low: tuple[int, float, Type], high: tuple[int, float, Type]) -> float:
    return (low[1] - high[1]) / (high[0] - low[0])
