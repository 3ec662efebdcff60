"""Moments of a tensor as it is stored, and how it is rounded by them.

    fit = fit_tensor(planned.source, moments, positions)
    data = fit.round(Type.IQ4_NL, rows)                 # uint8 [n, row_bytes]
    fit.loss(delta, at)                                 # nats: what rounding errors at rows `at` do to the answers

Padding, mirrored rows and llama.cpp's order of q and k are followed here. Numpy only, so that writing needs no torch.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from numpy.typing import NDArray

from converters import blocks
from converters.calibration.moments import Moments
from converters.calibration.rounding import LAYOUTS, Factor, compensation, round_compensated
from converters.checkpoint import F32, TensorSource
from converters.ggml import quantise_rows
from converters.tensors import RopeRows, permute_heads
from converters.vision import MirroredTensor

_LOCK = threading.Lock()


@dataclass(frozen=True, eq=False)
class Fit:
    """Moments by stored channel, and the answer positions that they were summed over."""

    moments: Moments
    positions: int

    def round(self, kind: Type, rows: F32, compiled: bool = False) -> NDArray[np.uint8]:
        """Rows in blocks of a type, errors made up for where the type's layout and the input's covariance are known.

        compiled: blocks' scales by blocks.py, where it has the type.
        """
        quantise = blocks.quantise_rows if compiled and blocks.can(kind) else quantise_rows
        if kind not in LAYOUTS or self.moments.covariance.ndim == 1:
            return quantise(kind, rows, self.moments.importance)
        return round_compensated(kind, rows, self.factor, self.moments.importance, quantise)

    @property
    def factor(self) -> Factor:
        """Of the covariance; the last few are kept."""
        with _LOCK:  # pieces of one tensor ask at once; it is made by the first
            return _factor(self)

    @cached_property
    def row_weights(self) -> F32:
        """How much each output matters, sum 1."""
        total = float(self.moments.outputs.sum())
        return self.moments.outputs / total if total > 0 else np.full_like(self.moments.outputs, 1 / len(self.moments.outputs))

    def expected_loss(self, kind: Type, rows: F32, at: NDArray[np.intp]) -> float:
        """About what `loss` will be of `rows`, which are the rows `at`, once they are rounded to a type.

        Where errors are made up for, a column's own costs no more than the factor's `spread`; it is about as large as ggml's.
        """
        data = quantise_rows(kind, rows, None if kind == Type.F16 else self.moments.importance)
        delta = dequantize(data, kind).reshape(rows.shape) - rows
        m = self.moments
        if kind not in LAYOUTS or m.covariance.ndim == 1:
            return self.loss(delta, at)
        weights = self.row_weights * float(np.trace(m.covariance))
        if m.columns is not None and m.rows is not None and m.rows.sum() > 0:
            weights = weights + m.rows / m.rows.sum() * float(m.columns.sum())
        return 0.5 * _share(delta**2 @ self.factor.spread, weights, at) / max(1, self.positions)

    def loss(self, delta: F32, at: NDArray[np.intp]) -> float:
        """The divergence (nats an answer position) that errors `delta` [n, width] of the rows `at` stand for, scaled to all rows.

        Second order; outputs are taken to be independent of one another, and of which inputs they see.
        """
        m = self.moments
        squares = delta**2 @ m.covariance if m.covariance.ndim == 1 else np.einsum("ij,ij->i", delta @ m.covariance, delta)
        loss = _share(squares, self.row_weights, at)
        if m.columns is not None and m.rows is not None and m.rows.sum() > 0:
            loss += _share(delta**2 @ m.columns, m.rows / m.rows.sum(), at)
        return 0.5 * loss / max(1, self.positions)


def _share(values: F32, weights: F32, at: NDArray[np.intp]) -> float:
    """The weighted mean over some rows; over all of them, where these are all."""
    chosen = weights[at]
    total = float(chosen.sum())
    return float((values * chosen).sum()) / total if total > 0 else float(values.mean())


@lru_cache(maxsize=4)
def _factor(fit: Fit) -> Factor:
    m = fit.moments
    return compensation(m.covariance if m.columns is None else m.covariance + np.diag(m.columns))


def fit_tensor(source: TensorSource, moments: Moments, positions: int) -> Fit:
    """The moments of a stored matrix, given those of the layer it comes from."""
    rows, width = source.shape
    outputs = moments.outputs
    if isinstance(source, RopeRows):
        outputs = permute_heads(outputs[:, None], source.head_dim)[:, 0]
    if isinstance(source, MirroredTensor):
        outputs = np.concatenate([outputs, outputs])
    outputs = np.pad(outputs, (0, rows - len(outputs)))
    missing = width - len(moments.covariance)
    covariance = np.pad(moments.covariance, (0, missing)) if missing else moments.covariance
    return Fit(replace(moments, covariance=covariance, outputs=outputs), positions)
