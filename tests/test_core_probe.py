"""The probe is the same on every machine and for ever; its summary sees what an average would hide."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from edgemed.core.probe import SUMMARY_ROWS, SUMMARY_WIDTH, probe_pixels, relative_l2, summarise, summary_rows


@pytest.mark.parametrize(
    ("size_px", "sha256"),
    [
        (224, "e46d5a1d4353d9788abeeda2e4f084f37355f30b7dd38a6b718cc7379958d3b4"),
        (336, "a929b3d897c80e233ef1bf6bef8f91e4348e70540e0f9f5cfdb949d2cc2b8c6d"),
        (384, "adf6571ca84ceb90d91d35363236c0d326a9af864d46732cb59112ce49c42920"),
    ],
)
def test_the_image_is_pinned(size_px: int, sha256: str) -> None:
    pixels = probe_pixels(size_px)
    assert pixels.shape == (size_px, size_px, 3) and pixels.dtype == np.uint8
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == sha256


def test_every_patch_differs() -> None:
    pixels = probe_pixels(224).reshape(16, 14, 16, 14, 3).swapaxes(1, 2).reshape(256, -1)
    assert len({row.tobytes() for row in pixels}) == 256


def test_the_summary_is_pinned() -> None:
    rows = np.random.default_rng(0).standard_normal((100, 64)).astype(np.float32)
    summary = summarise(rows)
    assert summary.shape == (SUMMARY_ROWS, SUMMARY_WIDTH) and summary.dtype == np.float32
    assert np.allclose(summary[0, :3], [0.2840617, -1.4405268, 0.6498607], atol=1e-6)


def test_kept_rows_include_both_ends() -> None:
    assert summary_rows(729)[[0, -1]].tolist() == [0, 728] and len(summary_rows(729)) == SUMMARY_ROWS
    assert summary_rows(5).tolist() == [0, 1, 2, 3, 4]


def test_the_summary_sees_a_shift_and_a_dropped_row() -> None:
    rows = np.random.default_rng(1).standard_normal((256, 576)).astype(np.float32)
    for wrong in (np.roll(rows, 1, axis=0), np.concatenate([rows[1:], rows[:1] * 0])):
        assert relative_l2(summarise(wrong), summarise(rows)) > 0.5


def test_distances_survive_the_projection() -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((256, 576)).astype(np.float32)
    near = rows + 0.01 * rng.standard_normal(rows.shape).astype(np.float32)
    assert relative_l2(summarise(near), summarise(rows)) == pytest.approx(relative_l2(near, rows), rel=0.2)


def test_distance_is_infinite_where_it_has_no_meaning() -> None:
    ones = np.ones((2, 2), np.float32)
    assert relative_l2(np.ones((2, 3), np.float32), ones) == float("inf")
    assert relative_l2(ones * np.nan, ones) == float("inf")
    assert relative_l2(ones, ones * 0) == float("inf")
    assert relative_l2(ones * 1.5, ones) == pytest.approx(0.5)
