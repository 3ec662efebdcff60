"""Searches for blocks' scales, compiled by numba: 64 blocks side by side, so that the processor's vector units are full.

    choose_affine(rows, importance, 15, grid, d, dmin, steps, mins)      # called by converters/blocks.py, which knows the formats

ggml's reference code (ggml-quants.c) takes one block after another, in scalar instructions. Here a group of blocks is transposed
first: value i of every block lies in one row, a *lane* for each block, and loops run over lanes. No sum is reordered and none fused
(numba's default without fastmath), so a block's result depends on its own values alone: not on its place, the number of threads, or
the processor. Constants are float32 throughout, as one float64 would turn whole expressions into float64. What would be a branch is
written as a choice between values, which vector units have.

What belongs to a lane lies in one array, `lane`, each quantity at a constant of its own: LLVM vectorises a loop over one array with
constant distances, but not one over a dozen arrays, which it would have to check for overlaps first.

Importing this module imports numba (half a second, 60 MB): only converters/blocks.py does, inside a function.
"""

# numba reads no annotations, and its decorator has no types: shapes and types are in the docstrings.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, type-var"

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

LANES = 64  # a group's values and weights, 32 · 64 · 2 float32, are 16 KB: they stay in the first-level cache
ZERO, ONE, TWO = np.float32(0), np.float32(1), np.float32(2)
MAGIC = np.float32(12582912)  # 1.5 · 2^23: adding it and taking it away leaves the nearest whole number, ties to even
LEAST = np.float32(1e-15)  # ggml's GROUP_MAX_EPS: a block that lies below is zero
FLAT = np.float32(1e-5)  # relative variance below which levels count as all alike: rounding noise is 2e-6
TIE = np.float32(1e-6)  # relative gain that is rounding noise
HUGE = np.float32(3e38)
F16_MAX, F16_LEAST, F16_NORMAL = np.float32(65504), np.float32(2.0**-24), np.float32(2.0**-14)
F16_SUBNORMAL_MAGIC = np.float32(0.75)  # float32's step between 0.5 and 1 is float16's below 2^-14
F16_SPLIT = np.float32(8193)  # Veltkamp's split at 2^13 + 1: 24 − 13 = 11 bits are left
TOP6 = np.float32(63)
LLOYD = 2  # rounds of "nearest levels, then the best line through them" after the search
# Where a quantity of each lane lies in `lane`. S1 to S3 are sums of a pass, NOW_… is what was best so far for the units that are tried.
LOW, HIGH, TOTAL, MEAN, INVERSE, OFFSET, S1, S2, S3, BEST, SCALE, MINIMUM, Q1, Q2 = (i * LANES for i in range(14))
UNIT, UNIT_MIN, UNIT_2, UNIT_MIN_2, STEP, MIN, LEAST_ERROR, NOW_STEP, NOW_MIN, NOW_REST = (i * LANES for i in range(14, 24))
LANE_VALUES = 24 * LANES


def compiled(function: Any) -> Any:
    """`function` as machine code, kept on disk for the next process where a folder for it can be written."""
    # numpy's division: Python's would check every divisor and raise, a branch that keeps a loop from being vectorised.
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither beside the module nor in the user's cache
        return njit(nogil=True, error_model="numpy")(function)


@compiled
def _pick(better, new, old):
    """`new` where it is better. Adding 0 keeps LLVM from making it a branch around a store, which would not be vectorised."""
    return (new if better else old) + ZERO


@compiled
def _storable(x):
    """The float16 nearest to x ≥ 0, as float32: at least float16's smallest where x is not 0, at most its largest."""
    if x <= ZERO:
        return ZERO
    if x < F16_NORMAL:
        return max((x + F16_SUBNORMAL_MAGIC) - F16_SUBNORMAL_MAGIC, F16_LEAST)
    high = x * F16_SPLIT
    return min(high - (high - x), F16_MAX)


@compiled
def _load(rows, first, count, x):
    """Blocks first…first + count of `rows` → x [size, lanes]."""
    size = x.shape[0]
    for v in range(count):
        start = (first + v) * size
        for i in range(size):
            x[i, v] = rows[start + i]


@compiled
def _load_columns(importance, first, count, w):
    """The importance of the same blocks' columns → w [size, lanes]."""
    size = w.shape[0]
    for v in range(count):
        start = ((first + v) * size) % importance.size
        for i in range(size):
            w[i, v] = importance[start + i]


@compiled
def _square_sums(x, lane, count):
    """Σx² → S1."""
    for v in range(count):
        lane[S1 + v] = ZERO
    for i in range(x.shape[0]):
        xi = x[i]
        for v in range(count):
            lane[S1 + v] += xi[v] * xi[v]


@compiled
def _weigh_by_importance(x, w, lane, count):
    """w, the importance, times sqrt(S1 + x²)."""
    for i in range(x.shape[0]):
        xi, wi = x[i], w[i]
        for v in range(count):
            wi[v] *= np.sqrt(lane[S1 + v] + xi[v] * xi[v])


@compiled
def _weigh_by_squares(x, w, count):
    for i in range(x.shape[0]):
        xi, wi = x[i], w[i]
        for v in range(count):
            wi[v] = xi[v] * xi[v]


@compiled
def _weigh_affine(importance, first, count, x, w, lane):
    """Q4_K's and Q5_K's weights: quantize_row_q4_K_ref without importance, quantize_row_q4_K_impl with it."""
    _square_sums(x, lane, count)
    if importance.size:
        _load_columns(importance, first, count, w)
        for v in range(0, count, 8):  # twice the mean of x² over a super-block of 256
            total = ZERO
            for j in range(v, v + 8):
                total += lane[S1 + j]
            for j in range(v, v + 8):
                lane[S1 + j] = TWO * total / np.float32(256)
        _weigh_by_importance(x, w, lane, count)
    else:  # sqrt(mean(x²)) + |x|, the mean over the block
        for v in range(count):
            lane[S1 + v] = np.sqrt(lane[S1 + v] / np.float32(32))
        for i in range(x.shape[0]):
            xi, wi = x[i], w[i]
            for v in range(count):
                wi[v] = lane[S1 + v] + abs(xi[v])


@compiled
def _centre(x, w, lane, count):
    """LOW, the smallest value or 0, HIGH, TOTAL = Σw, and MEAN, the weighted one, which is then taken off x."""
    for v in range(count):
        lane[LOW + v] = ZERO
        lane[HIGH + v] = -HUGE
        lane[TOTAL + v] = ZERO
        lane[MEAN + v] = ZERO
    for i in range(0, x.shape[0], 2):
        xi, wi, xj, wj = x[i], w[i], x[i + 1], w[i + 1]
        for v in range(count):
            lane[LOW + v] = min(lane[LOW + v], min(xi[v], xj[v])) + ZERO  # see _pick
            lane[HIGH + v] = max(lane[HIGH + v], max(xi[v], xj[v])) + ZERO
            lane[TOTAL + v] += wi[v] + wj[v]
            lane[MEAN + v] += wi[v] * xi[v] + wj[v] * xj[v]
    for v in range(count):
        lane[MEAN + v] = lane[MEAN + v] / lane[TOTAL + v] if lane[TOTAL + v] > ZERO else ZERO
    for i in range(x.shape[0]):
        xi = x[i]
        for v in range(count):
            xi[v] -= lane[MEAN + v]


@compiled
def _affine_sums(x, w, lane, limit, count):
    """S1 = Σwq, S2 = Σwq², S3 = Σwqx for q = x · INVERSE + OFFSET, rounded, in 0…limit. Two values a turn: half the traffic."""
    for v in range(count):
        lane[S1 + v] = ZERO
        lane[S2 + v] = ZERO
        lane[S3 + v] = ZERO
    for i in range(0, x.shape[0], 2):
        xi, wi, xj, wj = x[i], w[i], x[i + 1], w[i + 1]
        for v in range(count):
            p = min(max(xi[v] * lane[INVERSE + v] + lane[OFFSET + v], ZERO), limit)
            p = (p + MAGIC) - MAGIC
            q = min(max(xj[v] * lane[INVERSE + v] + lane[OFFSET + v], ZERO), limit)
            q = (q + MAGIC) - MAGIC
            wp, wq = wi[v] * p, wj[v] * q
            lane[S1 + v] += wp + wq
            lane[S2 + v] += wp * p + wq * q
            lane[S3 + v] += wp * xi[v] + wq * xj[v]


@compiled
def _affine_error(x, w, lane, limit, count):
    """S3 = Σw · r², S1 = Σw · r, where r = UNIT · STEP · q − t, t = x + OFFSET, q = t · INVERSE, rounded, in 0…limit."""
    for v in range(count):
        lane[S1 + v] = ZERO
        lane[S2 + v] = lane[UNIT + v] * lane[STEP + v]
        lane[S3 + v] = ZERO
    for i in range(0, x.shape[0], 2):
        xi, wi, xj, wj = x[i], w[i], x[i + 1], w[i + 1]
        for v in range(count):
            s, t = xi[v] + lane[OFFSET + v], xj[v] + lane[OFFSET + v]
            p = min(max(s * lane[INVERSE + v], ZERO), limit)
            p = ((p + MAGIC) - MAGIC) * lane[S2 + v] - s
            q = min(max(t * lane[INVERSE + v], ZERO), limit)
            q = ((q + MAGIC) - MAGIC) * lane[S2 + v] - t
            wp, wq = wi[v] * p, wj[v] * q
            lane[S1 + v] += wp + wq
            lane[S3 + v] += wp * p + wq * q


@compiled
def _fit_affine(lane, count):
    """One candidate's least-squares line, kept in SCALE and MINIMUM where it explains more than those before (make_qkx2_quants).

    x is centred, Σwx = 0, so what a line explains, Σwx² less the error left, follows from sums: (Σwqx)² / (Σwq² − (Σwq)² / Σw).
    The minimum may not be above 0; the best line through 0 is taken then. MINIMUM is stored without its sign.
    """
    for v in range(count):
        mean, s1, s2, s3 = lane[MEAN + v], lane[S1 + v], lane[S2 + v], lane[S3 + v]
        total = lane[TOTAL + v] if lane[TOTAL + v] > ZERO else ONE
        square = s2 if s2 > ZERO else ONE
        variance = s2 - s1 * s1 / total
        varied = variance > FLAT * square
        slope = s3 / (variance if varied else ONE)
        constant = mean - slope * s1 / total
        through_zero = (constant > ZERO) | (not varied)
        product = s3 + mean * s1
        offcut = mean * mean * total
        explained = product * product / square - offcut if through_zero else s3 * slope
        slope = product / square if through_zero else slope
        # Of a constant block's many lines, all as good, the first: its neighbours then choose alike.
        better = (explained > lane[BEST + v] + TIE * offcut) & (s2 > ZERO) & (slope > ZERO)
        lane[BEST + v] = _pick(better, explained, lane[BEST + v])
        lane[SCALE + v] = _pick(better, slope, lane[SCALE + v])
        lane[MINIMUM + v] = _pick(better, ZERO if through_zero else -constant, lane[MINIMUM + v])
        lane[Q1 + v] = _pick(better, s1, lane[Q1 + v])
        lane[Q2 + v] = _pick(better, s2, lane[Q2 + v])


@compiled
def _search_affine(x, w, lane, limit, grid, count):
    """SCALE and MINIMUM of every lane, and the sums Q1 = Σwq, Q2 = Σwq² of their levels."""
    for v in range(count):
        lane[SCALE + v] = (lane[HIGH + v] - lane[LOW + v]) / limit
        lane[MINIMUM + v] = -lane[LOW + v]
        lane[Q1 + v] = ZERO
        lane[Q2 + v] = ZERO
        lane[BEST + v] = -HUGE
    for k in range(grid.size + LLOYD):
        for v in range(count):
            if k < grid.size:
                spread = lane[HIGH + v] - lane[LOW + v]
                inverse = (limit + grid[k]) / spread if spread > ZERO else ZERO
                offset = (lane[MEAN + v] - lane[LOW + v]) * inverse
            else:
                inverse = ONE / lane[SCALE + v] if lane[SCALE + v] > ZERO else ZERO
                offset = (lane[MEAN + v] + lane[MINIMUM + v]) * inverse
            lane[INVERSE + v] = inverse
            lane[OFFSET + v] = offset
        _affine_sums(x, w, lane, limit, count)
        _fit_affine(lane, count)


@compiled
def _common_unit(lane, values, weights):
    """(u, v): two float16 of which eight values ≥ 0, at lane[values], become multiples, 0…63.

    u is a 63rd of the largest value (quantize_row_q4_K_ref), v the weighted least-squares unit of the best of nine roundings
    (make_qp_quants).
    """
    top = ZERO
    for j in range(8):
        top = max(top, lane[values + j])
    if top <= ZERO:
        return ZERO, ZERO
    least, product, square = HUGE, ZERO, ONE
    for k in range(-4, 5):
        inverse = (TOP6 + np.float32(0.1) * np.float32(k)) / top
        unit = ONE / inverse
        error, s1, s2 = ZERO, ZERO, ZERO
        for j in range(8):
            value, weight = lane[values + j], lane[weights + j]
            q = min((value * inverse + MAGIC) - MAGIC, TOP6)
            error += weight * (value - unit * q) * (value - unit * q)
            s1 += weight * value * q
            s2 += weight * q * q
        if error < least and s2 > ZERO:
            least, product, square = error, s1, s2
    plain = _storable(top / TOP6)
    return plain, _storable(product / square) if product > ZERO else plain


@compiled
def _propose(lane, option, count):
    """STEP and MIN to try for UNIT and UNIT_MIN. 0: both rounded; 1, 2: the scale down or up, and the minimum that goes best with it;
    3: the best of these, with the minimum moved by what was left over on average."""
    for v in range(count):
        unit, unit_min, total = lane[UNIT + v], lane[UNIT_MIN + v], lane[TOTAL + v]
        exact = lane[SCALE + v] / unit if unit > ZERO else ZERO
        step = (exact + MAGIC) - MAGIC if option == 0 else np.floor(exact) + np.float32(option - 1)
        step = lane[NOW_STEP + v] if option == 3 else min(step, TOP6)
        # The derivative of the error by the minimum is zero there.
        moved = lane[Q1 + v] * (unit * step - lane[SCALE + v]) if option > 0 else ZERO
        moved = lane[NOW_REST + v] if option == 3 else moved
        wanted = (lane[NOW_MIN + v] * unit_min if option == 3 else lane[MINIMUM + v]) + (moved / total if total > ZERO else ZERO)
        m = min(max(wanted / unit_min if unit_min > ZERO else ZERO, ZERO), TOP6)
        m = (m + MAGIC) - MAGIC
        lane[STEP + v] = step
        lane[MIN + v] = m
        lane[INVERSE + v] = ONE / (unit * step) if unit * step > ZERO else ZERO
        lane[OFFSET + v] = lane[MEAN + v] + unit_min * m


@compiled
def _round_affine(x, w, lane, limit, count):
    """NOW_STEP and NOW_MIN, six bits each, with the least weighted error for UNIT and UNIT_MIN; that error in LEAST_ERROR."""
    for option in range(4):
        _propose(lane, option, count)
        _affine_error(x, w, lane, limit, count)
        for v in range(count):
            # The first counts whatever its error is, which overflows for values of 1e13.
            better = (option == 0) | (lane[S3 + v] < lane[LEAST_ERROR + v])
            lane[LEAST_ERROR + v] = _pick(better, lane[S3 + v], lane[LEAST_ERROR + v])
            lane[NOW_STEP + v] = _pick(better, lane[STEP + v], lane[NOW_STEP + v])
            lane[NOW_MIN + v] = _pick(better, lane[MIN + v], lane[NOW_MIN + v])
            lane[NOW_REST + v] = _pick(better, lane[S1 + v], lane[NOW_REST + v])


@compiled
def choose_affine(rows, importance, top, grid, d, dmin, steps, mins):
    """Q4_K and Q5_K: scales and minima of x ≈ d · step · q − dmin · min, q in 0…top, over super-blocks of 8 blocks of 32.

    rows float32 [n · 32], n a multiple of 8; importance float32 [width], or empty; grid float32 [k]: what to add to `top` before the
    range of a block is divided by it → d, dmin float32 [n / 8] that are float16's, steps, mins uint8 [n], 0…63.

    A block's scale and minimum are searched as ggml does, and then improved. Their six-bit roundings are chosen together: for two
    pairs of units, of four roundings the one with the smallest weighted error of the block as it will be read.
    """
    blocks = rows.size // 32
    x, w = np.empty((32, LANES), np.float32), np.empty((32, LANES), np.float32)
    lane = np.zeros(LANE_VALUES, np.float32)
    limit = np.float32(top)
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _load(rows, first, count, x)
        _weigh_affine(importance, first, count, x, w, lane)
        _centre(x, w, lane, count)
        _search_affine(x, w, lane, limit, grid, count)
        for v in range(0, count, 8):
            unit, unit_2 = _common_unit(lane, SCALE + v, Q2 + v)
            unit_min, unit_min_2 = _common_unit(lane, MINIMUM + v, TOTAL + v)
            for j in range(v, v + 8):
                lane[UNIT + j] = unit
                lane[UNIT_MIN + j] = unit_min
                lane[UNIT_2 + j] = unit_2
                lane[UNIT_MIN_2 + j] = unit_min_2
        for attempt in range(2):
            if attempt:
                for v in range(count):
                    lane[UNIT + v] = lane[UNIT_2 + v]
                    lane[UNIT_MIN + v] = lane[UNIT_MIN_2 + v]
            _round_affine(x, w, lane, limit, count)
            for v in range(0, count, 8):
                error, other = ZERO, ZERO
                for j in range(v, v + 8):
                    error += lane[LEAST_ERROR + j]
                    other += lane[BEST + j]
                if attempt == 0 or error < other:
                    d[(first + v) // 8] = lane[UNIT + v]
                    dmin[(first + v) // 8] = lane[UNIT_MIN + v]
                    for j in range(v, v + 8):
                        lane[BEST + j] = lane[LEAST_ERROR + j]
                        steps[first + j] = np.uint8(lane[NOW_STEP + j])
                        mins[first + j] = np.uint8(lane[NOW_MIN + j])


@compiled
def _levels(block, scale, minimum, lowest, top, out):
    """The nearest q, in lowest…top, of x ≈ scale · q − minimum for each value of a block; `lowest` is taken off to store it."""
    inverse = ONE / scale if scale != ZERO else ZERO
    for i in range(block.size):
        q = min(max((block[i] + minimum) * inverse, lowest), top)
        out[i] = np.uint8(np.int32(((q + MAGIC) - MAGIC) - lowest))


@compiled
def pack_affine(rows, d, dmin, steps, mins, top, out):
    """Q4_K's and Q5_K's bytes after d and dmin: packed scales, for 5 bits every value's high bit, low bits.

    As choose_affine made them; out uint8 [n / 8, 144 or 176].
    """
    q = np.empty(256, np.uint8)
    limit = np.float32(top)
    lows = 16 if top == 15 else 48
    for b in range(d.size):
        to = out[b]
        s, m = steps[8 * b : 8 * b + 8], mins[8 * b : 8 * b + 8]
        for j in range(8):
            block = rows[256 * b + 32 * j : 256 * b + 32 * j + 32]
            _levels(block, d[b] * np.float32(s[j]), dmin[b] * np.float32(m[j]), ZERO, limit, q[32 * j : 32 * j + 32])
        for j in range(4):  # get_scale_min_k4
            to[4 + j] = s[j] | ((s[j + 4] >> 4) << 6)
            to[8 + j] = m[j] | ((m[j + 4] >> 4) << 6)
            to[12 + j] = (s[j + 4] & 15) | ((m[j + 4] & 15) << 4)
        for j in range(4):
            left, right = q[64 * j : 64 * j + 32], q[64 * j + 32 : 64 * j + 64]
            low = to[lows + 32 * j : lows + 32 * j + 32]
            for i in range(32):
                low[i] = (left[i] & 15) | ((right[i] & 15) << 4)
        if top == 31:
            high = to[16:48]
            high[:] = 0
            for j in range(8):
                part = q[32 * j : 32 * j + 32]
                for i in range(32):
                    high[i] |= (part[i] >> 4) << j


@compiled
def _largest(x, lane, count):
    """HIGH: the value that is largest without its sign; 0 for a block that counts as zero."""
    for v in range(count):
        lane[HIGH + v] = ZERO
    for i in range(x.shape[0]):
        xi = x[i]
        for v in range(count):
            lane[HIGH + v] = _pick(abs(xi[v]) > abs(lane[HIGH + v]), xi[v], lane[HIGH + v])
    for v in range(count):
        lane[HIGH + v] = lane[HIGH + v] if abs(lane[HIGH + v]) >= LEAST else ZERO


@compiled
def _symmetric_sums(x, w, lane, bottom, top, count):
    """S1 = Σwqx, S2 = Σwq² for q = x · INVERSE, rounded, in bottom…top."""
    for v in range(count):
        lane[S1 + v] = ZERO
        lane[S2 + v] = ZERO
    for i in range(0, x.shape[0], 2):
        xi, wi, xj, wj = x[i], w[i], x[i + 1], w[i + 1]
        for v in range(count):
            p = min(max(xi[v] * lane[INVERSE + v], bottom), top)
            p = (p + MAGIC) - MAGIC
            q = min(max(xj[v] * lane[INVERSE + v], bottom), top)
            q = (q + MAGIC) - MAGIC
            wp, wq = wi[v] * p, wj[v] * q
            lane[S1 + v] += wp * xi[v] + wq * xj[v]
            lane[S2 + v] += wp * p + wq * q


@compiled
def _symmetric_error(x, w, lane, bottom, top, count):
    """S2 = Σw (UNIT · STEP · q − x)² with q = x · INVERSE, rounded, in bottom…top."""
    for v in range(count):
        lane[S1 + v] = lane[UNIT + v] * lane[STEP + v]
        lane[S2 + v] = ZERO
    for i in range(0, x.shape[0], 2):
        xi, wi, xj, wj = x[i], w[i], x[i + 1], w[i + 1]
        for v in range(count):
            p = min(max(xi[v] * lane[INVERSE + v], bottom), top)
            p = ((p + MAGIC) - MAGIC) * lane[S1 + v] - xi[v]
            q = min(max(xj[v] * lane[INVERSE + v], bottom), top)
            q = ((q + MAGIC) - MAGIC) * lane[S1 + v] - xj[v]
            lane[S2 + v] += wi[v] * p * p + wj[v] * q * q


@compiled
def _fit_symmetric(lane, count):
    """One candidate's least-squares scale, kept in SCALE where it explains more, (Σwqx)² / Σwq² (ggml: make_qx_quants)."""
    for v in range(count):
        fitted = lane[S1 + v] / (lane[S2 + v] if lane[S2 + v] > ZERO else ONE)
        explained = fitted * lane[S1 + v]
        better = explained > lane[BEST + v]
        lane[BEST + v] = _pick(better, explained, lane[BEST + v])
        lane[SCALE + v] = _pick(better, fitted, lane[SCALE + v])


@compiled
def choose_symmetric(rows, importance, d, steps):
    """Q6_K: scales of x ≈ d · step · q, q in −32…31, over super-blocks of 16 blocks of 16.

    rows float32 [n · 16], n a multiple of 16; importance float32 [width], or empty → d float32 [n / 16] that are float16's,
    steps int8 [n]. Weights are x² (quantize_row_q6_K_ref), or the importance alone (quantize_row_q6_K_impl). Of the two steps next
    to a block's scale the one with the smaller weighted error is taken.
    """
    f = np.float32
    blocks = rows.size // 16
    x, w = np.empty((16, LANES), f), np.empty((16, LANES), f)
    lane = np.zeros(LANE_VALUES, f)
    bottom, top = f(-32), f(31)
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _load(rows, first, count, x)
        if importance.size:
            _load_columns(importance, first, count, w)
        else:
            _weigh_by_squares(x, w, count)
        _largest(x, lane, count)
        for v in range(count):
            lane[SCALE + v] = lane[HIGH + v] / bottom
            lane[BEST + v] = ZERO
        for k in range(-9, 10 + LLOYD):
            for v in range(count):
                by = lane[HIGH + v] if k < 10 else lane[SCALE + v]
                end = bottom - f(0.1) * f(k) if k < 10 else ONE
                lane[INVERSE + v] = end / by if by != ZERO else ZERO
            _symmetric_sums(x, w, lane, bottom, top, count)
            _fit_symmetric(lane, count)
        for v in range(0, count, 16):
            most = ZERO
            for j in range(v, v + 16):
                most = lane[SCALE + j] if abs(lane[SCALE + j]) > abs(most) else most
            # The block with the largest scale gets step −128, whichever sign it has.
            size = _storable(abs(most) / f(128))
            size = -size if most > ZERO else size
            d[(first + v) // 16] = size
            for j in range(v, v + 16):
                lane[UNIT + j] = size
        for option in range(2):
            for v in range(count):
                unit = lane[UNIT + v]
                exact = lane[SCALE + v] / unit if unit != ZERO else ZERO
                step = min(max(np.floor(exact) + f(option), f(-128)), f(127))
                lane[STEP + v] = step
                lane[INVERSE + v] = ONE / (unit * step) if unit * step != ZERO else ZERO
            _symmetric_error(x, w, lane, bottom, top, count)
            for v in range(count):
                if option == 0 or lane[S2 + v] < lane[BEST + v]:
                    lane[BEST + v] = lane[S2 + v]
                    steps[first + v] = np.int8(lane[STEP + v])


@compiled
def pack_symmetric(rows, d, steps, out):
    """Q6_K's bytes before the scales: low four bits, then high two. As choose_symmetric made them; out uint8 [n / 16, 210]."""
    q = np.empty(256, np.uint8)
    for b in range(d.size):
        to = out[b]
        for j in range(16):
            start = 256 * b + 16 * j
            scale = d[b] * np.float32(steps[16 * b + j])
            _levels(rows[start : start + 16], scale, ZERO, np.float32(-32), np.float32(31), q[16 * j : 16 * j + 16])
        for half in range(2):
            part = q[128 * half : 128 * half + 128]
            low, high = to[64 * half : 64 * half + 64], to[128 + 32 * half : 160 + 32 * half]
            for i in range(64):
                low[i] = (part[i] & 15) | ((part[i + 64] & 15) << 4)
            for i in range(32):
                high[i] = (part[i] >> 4) | ((part[i + 32] >> 4) << 2) | ((part[i + 64] >> 4) << 4) | ((part[i + 96] >> 4) << 6)


@compiled
def _level(a, value):
    """kvalues_iq4nl (ggml-common.h) of the level nearest to a, or its number: a step is counted where a lies above its middle."""
    q = np.float32(-127) if value else ZERO
    q += (np.float32(23) if value else ONE) if a > np.float32(-115.5) else ZERO
    q += (np.float32(21) if value else ONE) if a > np.float32(-93.5) else ZERO
    q += (np.float32(18) if value else ONE) if a > np.float32(-74) else ZERO
    q += (np.float32(16) if value else ONE) if a > np.float32(-57) else ZERO
    q += (np.float32(14) if value else ONE) if a > np.float32(-42) else ZERO
    q += (np.float32(13) if value else ONE) if a > np.float32(-28.5) else ZERO
    q += (np.float32(12) if value else ONE) if a > np.float32(-16) else ZERO
    q += (np.float32(11) if value else ONE) if a > np.float32(-4.5) else ZERO
    q += (np.float32(12) if value else ONE) if a > np.float32(7) else ZERO
    q += (np.float32(12) if value else ONE) if a > np.float32(19) else ZERO
    q += (np.float32(13) if value else ONE) if a > np.float32(31.5) else ZERO
    q += (np.float32(15) if value else ONE) if a > np.float32(45.5) else ZERO
    q += (np.float32(16) if value else ONE) if a > np.float32(61) else ZERO
    q += (np.float32(20) if value else ONE) if a > np.float32(79) else ZERO
    q += (np.float32(24) if value else ONE) if a > np.float32(101) else ZERO
    return q


@compiled
def choose_uneven(rows, importance, scale):
    """IQ4_NL: the scale of x ≈ scale · level, one of 16, for blocks of 32 (ggml: quantize_row_iq4_nl_impl).

    rows float32 [n · 32]; importance float32 [width], or empty → scale float32 [n]. Weights are x², or the importance times
    sqrt(2 · mean(x²) + x²).
    """
    f = np.float32
    blocks = rows.size // 32
    x, w = np.empty((32, LANES), f), np.empty((32, LANES), f)
    lane = np.zeros(LANE_VALUES, f)
    for first in range(0, blocks, LANES):
        count = min(LANES, blocks - first)
        _load(rows, first, count, x)
        if importance.size:
            _load_columns(importance, first, count, w)
            _square_sums(x, lane, count)
            for v in range(count):
                lane[S1 + v] = TWO * lane[S1 + v] / f(32)
            _weigh_by_importance(x, w, lane, count)
        else:
            _weigh_by_squares(x, w, count)
        _largest(x, lane, count)
        for v in range(count):
            lane[SCALE + v] = lane[HIGH + v] / f(-127)
            lane[BEST + v] = ZERO
        for k in range(-8, 8 + LLOYD):
            # The largest value at either end of the levels: at 127, then at −134 to −120.
            end = ONE if k >= 8 else f(127) if k == -8 else f(k - 127)
            for v in range(count):
                by = lane[HIGH + v] if k < 8 else lane[SCALE + v]
                lane[INVERSE + v] = end / by if by != ZERO else ZERO
                lane[S1 + v] = ZERO
                lane[S2 + v] = ZERO
            for i in range(32):
                xi, wi = x[i], w[i]
                for v in range(count):
                    q = _level(xi[v] * lane[INVERSE + v], True)
                    lane[S1 + v] += wi[v] * q * xi[v]
                    lane[S2 + v] += wi[v] * q * q
            _fit_symmetric(lane, count)
        for v in range(count):
            scale[first + v] = lane[SCALE + v]


@compiled
def pack_uneven(rows, scale, out):
    """IQ4_NL's bytes after the scale; scale float32 [n] of float16's, out uint8 [n, 18]."""
    q = np.empty(32, np.uint8)
    for b in range(scale.size):
        inverse = ONE / scale[b] if scale[b] != ZERO else ZERO
        block, low = rows[32 * b : 32 * b + 32], out[b, 2:18]
        for i in range(32):
            q[i] = np.uint8(np.int32(_level(block[i] * inverse, False)))
        for i in range(16):
            low[i] = q[i] | (q[i + 16] << 4)
