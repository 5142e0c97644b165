import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.evaluation.frechet import (
  FeatureStatistics,
  frechet_distance,
  kernel_distance,
  vgg_frechet_distance,
)


@pytest.mark.parity("frechet")
def test_official_value(golden):
  out = golden.outputs()
  a, b = FeatureStatistics.of(out["a"]), FeatureStatistics.of(out["b"])
  np.testing.assert_allclose(frechet_distance(a, b), out["fid"], rtol=1e-9)


def test_diagonal_gaussians_have_a_closed_form():
  mean, sd = np.array([1.0, -2.0, 0.5]), np.array([2.0, 1.0, 3.0])
  a = FeatureStatistics(10, np.zeros(3), np.eye(3) * 9)
  b = FeatureStatistics(10, mean, np.diag(sd**2) * 9)
  expected = np.sum(mean**2) + np.sum((sd - 1) ** 2)
  np.testing.assert_allclose(frechet_distance(a, b), expected, rtol=1e-12)
  assert abs(frechet_distance(b, b)) < 1e-12


def test_fewer_images_than_features_is_still_zero_to_itself():
  x = FeatureStatistics.of(np.random.default_rng(0).normal(size=(10, 32)))
  assert abs(frechet_distance(x, x)) < 1e-5


def test_merged_statistics_are_those_of_the_union():
  x = np.random.default_rng(0).normal(5, 1, (50, 8))
  merged = FeatureStatistics.of(x[:13]).merge(FeatureStatistics.of(x[13:]))
  whole = FeatureStatistics.of(x)
  assert merged.count == 50
  np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
  np.testing.assert_allclose(merged.covariance, np.cov(x.T), rtol=1e-10, atol=1e-12)


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


def test_refusals():
  few = FeatureStatistics.of(np.zeros((1999, 2)))
  with pytest.raises(UserError, match="VGG-FD needs at least 2000 images.*1999.*VGG-KD"):
    vgg_frechet_distance(few, few)
  one = np.zeros((1, 2))
  with pytest.raises(UserError, match="at least 2"):
    frechet_distance(FeatureStatistics.of(one), few)
  with pytest.raises(UserError, match="at least 2"):
    kernel_distance(one, one)
