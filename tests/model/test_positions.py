"""Relative positions: buckets and the layout of the bias."""

from pathlib import Path

import jax
import numpy as np
import pytest

from t5like.model import positions

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "hf_logits.npz")


@pytest.mark.parametrize("rows", [5, 128, 384])  # in one go, just one band, several
def test_each_row_is_shifted_by_one_and_gradients_are_summed_along_diagonals(rows):
    columns, rng = 301, np.random.default_rng(0)
    diagonals = rng.normal(size=(2, rows + columns - 1)).astype(np.float32)
    gradient = rng.normal(size=(2, rows, columns)).astype(np.float32)
    out, back = jax.vjp(lambda x: positions.shift_rows(x, rows, columns), diagonals)
    indices = np.arange(columns)[None] - np.arange(rows)[:, None] + rows - 1  # [rows, columns], of the diagonals
    np.testing.assert_array_equal(out, diagonals[:, indices])
    expected = np.zeros(diagonals.shape)
    np.add.at(expected, (slice(None), indices), gradient)
    np.testing.assert_allclose(back(gradient)[0], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_relative_buckets_equal_those_of_hugging_face(bidirectional):
    buckets = positions.relative_buckets(
        GOLDEN["buckets.distance"], buckets=32, max_distance=128, bidirectional=bidirectional
    )
    np.testing.assert_array_equal(buckets, GOLDEN[f"buckets.{bidirectional}"])
