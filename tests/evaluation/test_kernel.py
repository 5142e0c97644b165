import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.evaluation.kernel import kernel_distance, kernel_inception_distance
from coda_jax.evaluation.rows import Rows


def test_kernel_distance_is_the_mean_over_distinct_pairs():
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(5, 4)), rng.normal(1, 1, size=(3, 4))

  def k(x, y):
    return (x @ y / 4 + 1) ** 3

  aa = np.mean([k(a[i], a[j]) for i in range(5) for j in range(5) if i != j])
  bb = np.mean([k(b[i], b[j]) for i in range(3) for j in range(3) if i != j])
  ab = np.mean([k(x, y) for x in a for y in b])
  np.testing.assert_allclose(kernel_distance(a, b), aa + bb - 2 * ab, rtol=1e-10)


def test_kernel_distance_is_unbiased():
  """Over many draws from one distribution its mean is zero; blocks of rows change nothing."""
  rng = np.random.default_rng(0)
  draws = [kernel_distance(*rng.normal(size=(2, 20, 8))) for _ in range(400)]
  assert abs(np.mean(draws)) < 4 * np.std(draws) / 20
  big = rng.normal(size=(1500, 4))
  shuffled = rng.permutation(big)
  np.testing.assert_allclose(kernel_distance(big, big[:9]), kernel_distance(shuffled, big[:9]))


def test_kid_is_the_mean_over_stated_subsets():
  rng = np.random.default_rng(0)
  a = rng.normal(size=(40, 4)).astype(np.float32)
  b = rng.normal(0.5, 1, size=(30, 4)).astype(np.float32)
  found = kernel_inception_distance(a, Rows([b[:13], b[13:]]), subsets=50, subset_size=20)
  assert (found.subsets, found.subset_size) == (50, 20)
  assert abs(found.mean - kernel_distance(a, b)) < 4 * found.std / 50**0.5
  assert found == kernel_inception_distance(a, b, subsets=50, subset_size=20)
  assert found != kernel_inception_distance(a, b, subsets=50, subset_size=20, seed=1)
  whole = kernel_inception_distance(a[:30], b, subsets=3)
  assert whole.subset_size == 30
  np.testing.assert_allclose(whole.mean, kernel_distance(a[:30], b), rtol=1e-6)


def test_refusals():
  one = np.zeros((1, 2))
  with pytest.raises(UserError, match="at least 2"):
    kernel_distance(one, one)
  with pytest.raises(UserError, match="features of 2 and 3"):
    kernel_inception_distance(np.zeros((4, 2)), np.zeros((4, 3)))
