"""Levels, allocation and the bound, against values from books and made by hand."""

import numpy as np
import pytest
from scipy.special import ndtri

from coda_jax.discretization import coding

# One variable of variance 1 at its quantiles, so that no test depends on draws.
NORMAL = ndtri((np.arange(100_000) + 0.5) / 100_000)


def test_levels_of_a_normal_variable_are_those_of_max():
  source = coding.LloydMax(NORMAL)
  np.testing.assert_allclose(source.levels(1), [0], atol=1e-9)
  np.testing.assert_allclose(source.levels(2), [-0.7979, 0.7979], atol=1e-3)
  np.testing.assert_allclose(source.levels(4), [-1.510, -0.4528, 0.4528, 1.510], atol=3e-3)
  errors = [source.error(n) for n in (1, 2, 3, 4, 8, 16)]  # Max (1960), table I
  np.testing.assert_allclose(errors, [1, 0.3634, 0.1902, 0.1175, 0.03454, 0.009497], rtol=5e-3)


def test_levels_of_few_samples():
  source = coding.LloydMax(np.array([0.0, 0.0, 1.0, 1.0, 5.0]))
  assert source.error(1) == pytest.approx(np.var([0, 0, 1, 1, 5]))
  np.testing.assert_allclose(source.levels(3), [0, 1, 5], atol=1e-9)
  assert source.error(3) == pytest.approx(0, abs=1e-9)
  assert source.error(5) == pytest.approx(0, abs=1e-9)
  constant = coding.LloydMax(np.full(4, 2.0))
  assert constant.error(2) == 0 and constant.levels(2).tolist() == [2, 2]


def test_bits_go_where_they_remove_most_error():
  sources = [coding.LloydMax(NORMAL * std) for std in (4.0, 1.0, 0.01)]
  # From 1 level to 2, 0.637 of the variance goes; from 2 to 4, 0.246 for the next bit. So the first
  # gets 4 levels (10.2, then 3.9) before the second gets 2 (0.64), and the third none.
  assert coding.allocate(sources, 2.0, 256) == [4, 1, 1]
  counts = coding.allocate(sources, 5.0, 256)
  assert counts[0] > counts[1] > counts[2] == 1
  assert 4.5 < np.log2(counts).sum() <= 5
  assert max(coding.allocate(sources, 100.0, 6)) == 6
  assert coding.allocate(sources, 0.5, 256) == [1, 1, 1]


def test_three_levels_where_two_do_not_pay():
  """Of a variable that is mostly 0, two levels cannot keep the middle."""
  sparse = coding.LloydMax(np.array([-1.0, *[0.0] * 98, 1.0]))
  assert sparse.error(3) == pytest.approx(0, abs=1e-12)
  assert coding.allocate([sparse], 2.0, 4) == [3]


def test_tokens_are_packed_in_order():
  assert coding.pack([3.0, 2.0, 0.0, 2.0, 1.0, 3.0], 5.0) == [[0, 1], [3, 4], [5]]
  assert coding.pack([0.0], 5.0) == []


def test_reverse_water_filling():
  variances = np.array([4.0, 1.0, 0.25])
  # At 1 bit the level is 1: the first gets log2(4 / 1) / 2 = 1 bit, the second reaches it.
  assert coding.water_level(variances, 1.0) == pytest.approx(1.0)
  np.testing.assert_allclose(coding.gaussian_bits(variances, 1.0), [1, 0, 0], atol=1e-12)
  assert coding.gaussian_error(variances, 1.0) == pytest.approx(1 + 1 + 0.25)
  # At 3 bits all are above the level t = 2 ** -2: log2(16) / 2 + log2(4) / 2 + 0.
  assert coding.water_level(variances, 3.0) == pytest.approx(0.25)
  np.testing.assert_allclose(coding.gaussian_bits(variances, 6.0).sum(), 6)
  assert coding.gaussian_error(variances, 6.0) == pytest.approx(3 * 0.25 / 4)
  assert coding.water_level(np.array([1.0, 0.0]), 1.0) == pytest.approx(0.25)


def test_the_bound_is_below_what_levels_reach():
  stds = np.array([3.0, 1.5, 1.0, 0.5])
  sources = [coding.LloydMax(NORMAL * std) for std in stds]
  counts = coding.allocate(sources, 8.0, 256)
  bits = float(np.log2(counts).sum())
  error = sum(s.error(n) for s, n in zip(sources, counts, strict=True))
  assert coding.gaussian_error(stds**2, bits) < error < 3 * coding.gaussian_error(stds**2, bits)
