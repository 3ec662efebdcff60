"""Compiled quantisation: what gguf reads back, its error against ggml's under ggml's own weights, and that places do not matter."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, dequantize
from tiny_checkpoint import random_tensor

from converters import blocks, ggml, quantise
from converters.quantise import Planned, quantised_pieces
from converters.tensors import ArrayTensor
from converters.writer import write_gguf
from edgemed.core.errors import RecipeError

pytestmark = pytest.mark.skipif(not blocks.available(), reason="numba is not installed")

ROOT = Path(__file__).resolve().parents[1]
KINDS = (Type.Q4_K, Type.Q5_K, Type.Q6_K, Type.IQ4_NL)
SHAPE = (24, 1024)
# A scale is a float16: ggml's errors and ours differ by its rounding at least where the blocks themselves come out exact.
F16_STEP = 2.0**-11


def weights(kind, rows, importance):
    """float64 [n, width]: what ggml's search multiplies squared errors with (ggml-quants.c, quantize_row_*_ref and *_impl)."""
    square = rows.astype(np.float64) ** 2

    def mean(size):
        return np.repeat(square.reshape(len(rows), -1, size).mean(-1), size, axis=1)

    if kind == Type.Q6_K:
        return square if importance is None else np.broadcast_to(importance, rows.shape).astype(np.float64)
    if kind == Type.IQ4_NL:
        return square if importance is None else importance * np.sqrt(2 * mean(32) + square)
    return np.sqrt(mean(32)) + np.sqrt(square) if importance is None else importance * np.sqrt(2 * mean(256) + square)


def error(kind, data, rows, importance):
    back = dequantize(data, kind).astype(np.float64)
    assert np.isfinite(back).all()
    return float((weights(kind, rows, importance) * (back - rows) ** 2).sum())


def realistic(rng):
    """Rows of different size, columns of different size, and a few outliers."""
    rows = rng.standard_normal(SHAPE) * 0.02 * np.exp(rng.standard_normal((SHAPE[0], 1)) / 3) * np.exp(rng.standard_normal(SHAPE[1]) / 4)
    return np.where(rng.random(SHAPE) < 1e-3, rows * 15, rows)


DISTRIBUTIONS = {
    "normal": lambda rng: rng.standard_normal(SHAPE) * 0.02,
    "heavy": lambda rng: rng.standard_t(3, SHAPE),
    "laplace": lambda rng: rng.laplace(size=SHAPE) * 1e3,
    "positive": lambda rng: rng.random(SHAPE),
    "negative": lambda rng: -1 - rng.random(SHAPE),
    "sparse": lambda rng: rng.standard_normal(SHAPE) * (rng.random(SHAPE) < 0.1),
    "constant": lambda rng: np.repeat(rng.standard_normal((SHAPE[0], SHAPE[1] // 256)), 256, axis=1),
    "tiny": lambda rng: rng.standard_normal(SHAPE) * 3e-6,
    "realistic": realistic,
}


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("kind", KINDS, ids=lambda t: t.name)
def test_error_is_at_most_ggmls(kind, name, weighted):
    rng = np.random.default_rng([1, int(kind), weighted])
    rows = DISTRIBUTIONS[name](rng).astype(np.float32)
    importance = (rng.gamma(0.5, size=SHAPE[1]) + 1e-4).astype(np.float32) if weighted else None
    ours = error(kind, blocks.quantise_rows(kind, rows, importance), rows, importance)
    theirs = error(kind, ggml.quantise_rows(kind, rows, importance), rows, importance)
    exact = float((weights(kind, rows, importance) * (rows.astype(np.float64) * F16_STEP) ** 2).sum())
    assert ours <= theirs * 1.0001 + (exact if name == "constant" else 0)


@pytest.mark.parametrize("kind", KINDS, ids=lambda t: t.name)
def test_zeros_stay_zeros(kind):
    rows = random_tensor("rows", (4, 512)).array
    rows[1] = 0
    rows[2, 256:] = 0
    back = dequantize(blocks.quantise_rows(kind, rows), kind)
    assert not back[1].any() and not back[2, 256:].any() and back[2, :256].any()
    assert np.isfinite(dequantize(blocks.quantise_rows(kind, rows, np.zeros(512, np.float32)), kind)).all()


@pytest.mark.parametrize("size", [1e-38, 1e-20, 1e7, 1e30])
@pytest.mark.parametrize("kind", KINDS, ids=lambda t: t.name)
def test_extreme_sizes_come_back_finite(kind, size):
    """Beyond float16's scales ggml writes infinity; here they are cut. Sums overflow then, and still depend on nothing else."""
    rows = (random_tensor("rows", (64, 512)).array * size).astype(np.float32)
    rows[::3] /= size
    data = blocks.quantise_rows(kind, rows)
    assert np.isfinite(dequantize(data, kind)).all()
    assert np.array_equal(np.concatenate([blocks.quantise_rows(kind, row[None]) for row in rows]), data)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda t: t.name)
def test_a_row_alone_has_the_same_bytes(kind, weighted):
    rows = random_tensor("rows", (37, 768)).array
    importance = np.random.default_rng(3).random(768, np.float32) if weighted else None
    whole = blocks.quantise_rows(kind, rows, importance)
    assert whole.shape == (37, ggml.row_bytes(kind, 768))
    for part in (slice(0, 1), slice(5, 8), slice(11, 37)):
        assert np.array_equal(blocks.quantise_rows(kind, rows[part], importance), whole[part])
    assert np.array_equal(blocks.quantise_rows(kind, np.asfortranarray(rows), importance), whole)


@pytest.mark.parametrize("kind", KINDS, ids=lambda t: t.name)
def test_pieces_and_threads_equal_the_whole(kind, monkeypatch):
    source = random_tensor("w", (37, 256))
    whole = blocks.quantise_rows(kind, source.array)
    monkeypatch.setattr(quantise, "PIECE_VALUES", 1000)
    with ThreadPoolExecutor(3) as pool:
        parts = [data for _, data in quantised_pieces([Planned("w", source, kind)], pool, 4, compiled=True)]
    assert len(parts) == 13
    assert np.array_equal(np.concatenate(parts), whole)


def test_large_jobs_are_compiled_and_small_ones_are_ggmls(tmp_path, monkeypatch):
    importance = np.linspace(0, 1, 512, dtype=np.float32)
    source = random_tensor("w", (64, 512))
    tensors = [Planned("w", source, Type.Q4_K, importance), Planned("u", source, Type.Q8_0)]

    def written(name):
        write_gguf(tmp_path / name, "llama", {}, tensors, threads=2)
        return [np.asarray(t.data) for t in GGUFReader(tmp_path / name).tensors]

    small = written("small.gguf")
    monkeypatch.setattr(blocks, "LEAST_VALUES", 64 * 512)
    large = written("large.gguf")
    assert np.array_equal(small[0], ggml.quantise_rows(Type.Q4_K, source.array, importance))
    assert np.array_equal(large[0], blocks.quantise_rows(Type.Q4_K, source.array, importance))
    assert np.array_equal(small[1], large[1])
    monkeypatch.setattr(blocks, "available", lambda: False)
    assert np.array_equal(written("without.gguf")[0], small[0])


def test_bad_shapes_are_refused():
    with pytest.raises(RecipeError, match="importance vector of 512"):
        blocks.quantise_rows(Type.Q4_K, np.zeros((1, 512), np.float32), np.ones(256, np.float32))
    with pytest.raises(RecipeError, match="multiple of 256 values for Q4_K, found 576"):
        blocks.quantise_rows(Type.Q4_K, np.zeros((1, 576), np.float32))
    assert blocks.quantise_rows(Type.Q4_K, np.zeros((0, 512), np.float32)).shape == (0, 288)
    assert np.array_equal(
        quantise.quantise_piece(Planned("w", ArrayTensor("w", np.ones((1, 4), np.float32)), Type.F32), 0, 1, True)[0][:2], [0, 0]
    )


def test_numba_waits_until_it_is_needed():
    code = "import sys, converters.convert, converters.readers, runtimes.engine; print('numba' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"
