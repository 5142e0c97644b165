import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.generation.masking import SCHEDULES, mask_ratio, masked_counts


def test_ratios_by_hand():
  t = np.array([0, 0.5, 1])
  np.testing.assert_allclose(mask_ratio("cosine", t), [1, 0.5**0.5, 0], atol=1e-15)
  np.testing.assert_allclose(mask_ratio("arccos", t), [1, 2 / 3, 0], atol=1e-15)
  np.testing.assert_allclose(mask_ratio("linear", t), [1, 0.5, 0], atol=1e-15)
  with pytest.raises(UserError, match="'square'.*cosine, arccos, linear"):
    mask_ratio("square", 0.5)


def test_counts_by_hand():
  np.testing.assert_array_equal(masked_counts("linear", 4, 680), [510, 340, 170, 0])
  # cos(pi/16 k) of 680: 666.9, 628.2, 565.4, 480.8, 377.8, 260.2, 132.7, 0
  expected = [666, 628, 565, 480, 377, 260, 132, 0]
  np.testing.assert_array_equal(masked_counts("cosine", 8, 680), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_reveals_and_none_ends_early(schedule):
  for tokens in (1, 5, 21, 680):
    for steps in {1, 2, 5, 7, 21, min(tokens, 97), tokens}:
      counts = np.concatenate([[tokens], masked_counts(schedule, steps, tokens)])
      assert counts[-1] == 0
      revealing = np.diff(counts) < 0
      assert revealing[: min(steps, tokens)].all(), (tokens, steps)


def test_counts_of_several_images():
  tokens = np.array([21, 0, 3])
  counts = masked_counts("cosine", 4, tokens)
  assert counts.shape == (4, 3)
  for column, n in zip(counts.T, tokens, strict=True):
    np.testing.assert_array_equal(column, masked_counts("cosine", 4, int(n)))
