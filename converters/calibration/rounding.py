"""Rounding to GGUF blocks so that errors cancel on the inputs that were seen: standard blocks, better codes.

    factor = compensation(covariance)
    data = round_compensated(Type.IQ4_NL, rows, factor, importance)      # float32 [n, width] → uint8 [n, row_bytes]

ggml chooses a block's scales (weighted by importance); then the columns are rounded one after another, and what a column's rounding
does to the layer's output is made up for by the columns that follow, as far as their inputs go together: GPTQ (Frantar et al. 2022,
arXiv:2210.17323) in the form of QuIP's LDLQ (Chee et al. 2023, arXiv:2307.13304), which needs no inverse. Knows block
layouts (ggml-common.h), no files and no models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf.quants import IQ4_NL
from numpy.typing import NDArray

from converters.checkpoint import F32
from converters.ggml import block_size, quantise_rows, row_bytes

U8 = NDArray[np.uint8]
LEVELS = np.array(IQ4_NL.kvalues, np.float32)
# Of the mean diagonal, added to it: keeps directions that were not seen from being spent.
DAMPING = 0.01
# Columns whose errors are collected before the rest of the row is corrected by them.
_LOT = 32


@dataclass(frozen=True)
class Layout:
    """How a type's blocks hold codes. value = scale · level(code) + offset, with level(code) = code unless `levels` says else.

    scales: raw blocks [n, bytes] → (scale, offset), float32 [n, block or a divisor of it], each for as many values in a row.
    store: writes codes uint8 [n, block] into raw blocks.
    """

    top: int
    scales: Callable[[U8], tuple[F32, F32]]
    store: Callable[[U8, U8], None]
    levels: F32 | None = None


def _f16(raw: U8, start: int) -> F32:
    return np.ascontiguousarray(raw[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(codes: U8, lot: int) -> U8:
    """4-bit halves of codes [n, m·lot] as ggml pairs them: a lot's first half low, its second half high."""
    pairs = codes.reshape(len(codes), -1, 2, lot // 2)
    low, high = (pairs[:, :, i] & np.uint8(15) for i in (0, 1))
    out: U8 = (low | (high << np.uint8(4))).reshape(len(codes), -1)
    return out


def _symmetric(middle: int) -> Callable[[U8], tuple[F32, F32]]:
    def scales(raw: U8) -> tuple[F32, F32]:
        d = _f16(raw, 0)
        return d, -middle * d

    return scales


def _affine(raw: U8) -> tuple[F32, F32]:
    return _f16(raw, 0), _f16(raw, 2)


def _store_at(start: int) -> Callable[[U8, U8], None]:
    def store(raw: U8, codes: U8) -> None:
        raw[:, start:] = _nibbles(codes, 32)

    return store


def _store_fifth(start: int) -> Callable[[U8, U8], None]:
    def store(raw: U8, codes: U8) -> None:
        raw[:, start : start + 4] = np.packbits(codes >> 4, axis=1, bitorder="little")
        raw[:, start + 4 :] = _nibbles(codes, 32)

    return store


def _store_q8_0(raw: U8, codes: U8) -> None:
    raw[:, 2:] = codes ^ 0x80  # code 128 is 0


def _iq4_nl(raw: U8) -> tuple[F32, F32]:
    d = _f16(raw, 0)
    return d, np.zeros_like(d)


def _k_scales(raw: U8) -> tuple[F32, F32]:
    """Q4_K and Q5_K: eight scales and minima of six bits, packed in twelve bytes (get_scale_min_k4)."""
    s = raw[:, 4:16]
    low, minimum = s[:, 0:4] & 63, s[:, 4:8] & 63
    high = (s[:, 8:12] & 15) | ((s[:, 0:4] >> 6) << 4)
    high_minimum = (s[:, 8:12] >> 4) | ((s[:, 4:8] >> 6) << 4)
    scale = np.concatenate([low, high], axis=1).astype(np.float32) * _f16(raw, 0)
    offset = np.concatenate([minimum, high_minimum], axis=1).astype(np.float32) * _f16(raw, 2)
    return scale, -offset


def _store_q4_k(raw: U8, codes: U8) -> None:
    raw[:, 16:] = _nibbles(codes, 64)


def _store_q5_k(raw: U8, codes: U8) -> None:
    fifth = (codes >> 4).reshape(len(codes), 8, 32)
    raw[:, 16:48] = (fifth << np.arange(8, dtype=np.uint8)[None, :, None]).sum(1, dtype=np.uint8)
    raw[:, 48:] = _nibbles(codes, 64)


def _q6_k(raw: U8) -> tuple[F32, F32]:
    scale = np.ascontiguousarray(raw[:, 192:208]).view(np.int8).astype(np.float32) * _f16(raw, 208)
    return scale, -32 * scale


def _store_q6_k(raw: U8, codes: U8) -> None:
    quarters = codes.reshape(len(codes), 2, 4, 32)  # of each half: 32 values four times
    low = quarters & 15
    raw[:, :128] = (low[:, :, :2] | (low[:, :, 2:] << 4)).reshape(len(codes), 128)
    high = (quarters >> 4) << np.array([0, 2, 4, 6], np.uint8)[None, None, :, None]
    raw[:, 128:192] = high.sum(2, dtype=np.uint8).reshape(len(codes), 64)


def _iq4_xs(raw: U8) -> tuple[F32, F32]:
    high = np.ascontiguousarray(raw[:, 2:4]).view("<u2").astype(np.int32)
    at = np.arange(8)
    low = (raw[:, 4 + at // 2].astype(np.int32) >> (4 * (at % 2))) & 15
    scale = ((low | (((high >> (2 * at)) & 3) << 4)) - 32).astype(np.float32) * _f16(raw, 0)
    return scale, np.zeros_like(scale)


def _store_iq4_xs(raw: U8, codes: U8) -> None:
    raw[:, 8:] = _nibbles(codes, 32)


LAYOUTS = {
    Type.Q4_0: Layout(15, _symmetric(8), _store_at(2)),
    Type.Q4_1: Layout(15, _affine, _store_at(4)),
    Type.Q5_0: Layout(31, _symmetric(16), _store_fifth(2)),
    Type.Q5_1: Layout(31, _affine, _store_fifth(4)),
    Type.Q8_0: Layout(255, _symmetric(128), _store_q8_0),
    Type.IQ4_NL: Layout(15, _iq4_nl, _store_at(2), LEVELS),
    Type.IQ4_XS: Layout(15, _iq4_xs, _store_iq4_xs, LEVELS),
    Type.Q4_K: Layout(15, _k_scales, _store_q4_k),
    Type.Q5_K: Layout(31, _k_scales, _store_q5_k),
    Type.Q6_K: Layout(63, _q6_k, _store_q6_k),
}


@dataclass(frozen=True)
class Factor:
    """H = (I + U)·D·(I + U)ᵀ of a covariance H with damping.

    feedback: U, float32 [width, width], strictly upper triangular; column k tells how the errors of the columns before it are made
    up for by it. spread: the diagonal of D, float32 [width]: what an error that is left in a column costs after that.
    """

    feedback: F32
    spread: F32


def compensation(covariance: F32) -> Factor:
    """The factor of a covariance [width, width]: one Cholesky decomposition, from the last column to the first."""
    h = covariance.astype(np.float64)
    mean = float(np.diagonal(h).mean())
    h[np.diag_indices_from(h)] += DAMPING * mean if mean > 0 else 1.0
    upper = np.linalg.cholesky(h[::-1, ::-1])[::-1, ::-1]
    diagonal = np.diagonal(upper).copy()
    return Factor(np.triu(upper / diagonal, 1).astype(np.float32), np.square(diagonal).astype(np.float32))


def round_compensated(
    kind: Type, rows: F32, factor: Factor, importance: F32 | None = None, quantise: Callable[[Type, F32, F32 | None], U8] = quantise_rows
) -> U8:
    """float32 [n, width] → uint8 [n, row_bytes]; each row on its own, so that pieces of a tensor may be rounded apart.

    quantise: what chooses blocks' scales.
    """
    layout, block = LAYOUTS[kind], block_size(kind)
    n, width = rows.shape
    out = np.empty((n, width // block, row_bytes(kind, block)), np.uint8)
    values = np.ascontiguousarray(rows.T, np.float32)
    wanted = values.copy()  # with what is to be made up for of the columns before
    for number, start in enumerate(range(0, width, block)):
        here = slice(start, start + block)
        # What the block's columns will be asked for, once each follows those before it in the block as well.
        shift = np.linalg.solve(np.eye(block, dtype=np.float32) + factor.feedback[here, here].T, wanted[here] - values[here])
        raw = quantise(kind, np.ascontiguousarray((values[here] + shift).T), None if importance is None else importance[here])
        scale, offset = (np.repeat(part, block // part.shape[1], axis=1).T.copy() for part in layout.scales(raw))
        codes = np.empty((block, n), np.uint8)
        for lot in range(0, block, _LOT):
            at, inside = slice(start + lot, start + lot + _LOT), slice(lot, lot + _LOT)
            errors = _round_lot(layout, values[at], wanted[at], scale[inside], offset[inside], factor.feedback[at, at], codes[inside])
            wanted[at.stop :] += factor.feedback[at, at.stop :].T @ errors
        layout.store(raw, np.ascontiguousarray(codes.T))
        out[:, number] = raw
    return out.reshape(n, -1)


def _round_lot(layout: Layout, values: F32, wanted: F32, scale: F32, offset: F32, feedback: F32, codes: U8) -> F32:
    """Round some columns [columns, n] in order, into `codes`; returns values less what is stored."""
    errors = np.empty_like(values)
    divisor = np.where(scale == 0, np.inf, scale).astype(np.float32)
    for j in range(len(values)):
        ratio = (wanted[j] - offset[j]) / divisor[j]
        if layout.levels is None:
            code = np.clip(np.rint(ratio), 0, layout.top)
            stored = scale[j] * code + offset[j]
        else:
            code = np.searchsorted((layout.levels[1:] + layout.levels[:-1]) / 2, ratio)
            stored = scale[j] * layout.levels[code] + offset[j]
        codes[j] = code
        errors[j] = values[j] - stored
        wanted[j + 1 :] += np.outer(feedback[j, j + 1 :], errors[j])
    return errors
