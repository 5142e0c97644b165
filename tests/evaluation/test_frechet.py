import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.evaluation.frechet import (
  FeatureStatistics,
  check_count,
  frechet_distance,
  vgg_frechet_distance,
)
from coda_jax.evaluation.rows import Rows


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


def test_statistics_of_a_stream_are_those_of_the_whole():
  x = np.random.default_rng(0).normal(5, 1, (2500, 8)).astype(np.float32)
  rows = Rows([x[:700], x[700:701], x[701:]])
  assert [len(b) for b in rows.blocks()] == [1024, 1024, 452]
  streamed = FeatureStatistics.of(rows)
  np.testing.assert_allclose(streamed.mean, x.mean(0, np.float64), rtol=1e-12)
  np.testing.assert_allclose(streamed.covariance, np.cov(x.T.astype(float)), rtol=1e-9, atol=1e-12)


def test_rows_in_files_and_any_of_them(tmp_path):
  x = np.arange(24, dtype=np.float32).reshape(12, 2)
  files = [tmp_path / "a.npy", tmp_path / "b.npy"]
  for file, part in zip(files, (x[:5], x[5:]), strict=True):
    np.save(file, part)
  rows = Rows(files)
  chosen = np.array([11, 4, 5, 0])
  np.testing.assert_array_equal(rows[chosen], x[chosen])
  np.testing.assert_array_equal(rows[3:8], x[3:8])
  files[1].write_bytes(b"")
  with pytest.raises(UserError, match="b.npy is damaged"):
    rows[:]


def test_counts_that_are_too_small():
  check_count("FID", 2048, 2049, None)
  with pytest.raises(
    UserError, match="FID needs at least 2049 images.*2048 features; got 84 and 9"
  ):
    check_count("FID", 2048, 84, 9)


def test_refusals():
  few = FeatureStatistics.of(np.zeros((1999, 2)))
  with pytest.raises(UserError, match="VGG-FD needs at least 2000 images.*1999.*VGG-KD"):
    vgg_frechet_distance(few, few)
  one = np.zeros((1, 2))
  with pytest.raises(UserError, match="at least 2"):
    frechet_distance(FeatureStatistics.of(one), few)
  with pytest.raises(UserError, match="statistics of 2 and of 3 features"):
    frechet_distance(few, FeatureStatistics.of(np.zeros((4, 3))))
  with pytest.raises(UserError, match="no images"):
    FeatureStatistics.of(Rows([]))
