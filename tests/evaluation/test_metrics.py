import functools

import jax
import numpy as np
import pytest

from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.image_quality import Quality, psnr, to_uint8
from coda_jax.evaluation.metrics import METRICS, QuantizationError, Results, short_line
from coda_jax.evaluation.reconstruction import Batch, BatchResult

CODES = 16


@pytest.fixture(scope="module")
def batch() -> Batch:
  rng = np.random.default_rng(0)
  n = 6
  result = BatchResult(
    images=rng.uniform(-1.2, 1.2, (n, 12, 14, 3)).astype(np.float32),
    lpips=rng.uniform(size=n).astype(np.float32),
    ids=[rng.integers(0, CODES, (n, p, p), np.int32) for p in (1, 3)],
    level_errors=rng.uniform(size=(n, 2)).astype(np.float32),
    latent_mean=rng.normal(size=(n, 4)).astype(np.float32),
    latent_power=rng.uniform(2, 3, size=n).astype(np.float32),
    codebook_size=CODES,
  )
  return Batch(rng.integers(0, 256, (n, 12, 14, 3), np.uint8), result)


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("sizes", [(6,), (1, 5), (2, 2, 2), (4, 0, 2), (0, 6)])
def test_merging_any_split_is_measuring_all_at_once(batch, kind, sizes):
  ends = np.cumsum(sizes)
  parts = [
    jax.tree.map(lambda x, a=a, b=b: x[a:b], batch)
    for a, b in zip([0, *ends[:-1]], ends, strict=True)
  ]
  merged = functools.reduce(lambda a, b: a.merge(b), (kind.of(part) for part in parts))
  whole = kind.of(batch)
  for ours, theirs in zip(jax.tree.leaves(merged), jax.tree.leaves(whole), strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert merged.summary() == whole.summary()


def test_results_by_class(batch):
  results = Results.of(batch)
  assert isinstance(results[Quality], Quality) and isinstance(results[CodebookUsage], CodebookUsage)
  alone = Results.of(batch, (Quality,))
  assert list(alone.summary()) == ["psnr", "ssim", "lpips"]
  with pytest.raises(KeyError, match="QuantizationError"):
    alone[QuantizationError]


def test_summary_is_what_a_trainer_has_always_logged(batch):
  """Names, order and values."""
  found, result = Results.of(batch).summary(), batch.result
  counts = [np.bincount(x.ravel(), minlength=CODES) for x in result.ids]
  p = sum(counts) / sum(counts).sum()
  expected = {
    "psnr": psnr(batch.images, to_uint8(result.images)).mean(),
    "ssim": Quality.of(batch).ssim.mean(),
    "lpips": result.lpips.mean(),
    "quantization_error": result.level_errors[:, -1].mean(),
    "codebook_utilization": np.mean(p > 0),
    "codebook_perplexity": np.exp(-np.sum(p[p > 0] * np.log(p[p > 0]))),
    "tokens_per_code": 60 / CODES,
    "quantization_error/level_1": result.level_errors[:, 0].mean(),
    "quantization_error/level_2": result.level_errors[:, 1].mean(),
    "codebook_utilization/level_1": np.mean(counts[0] > 0),
    "codebook_utilization/level_2": np.mean(counts[1] > 0),
  }
  assert list(found) == list(expected)
  assert all(type(x) is float for x in found.values())
  assert found == pytest.approx(expected, rel=1e-6)


def test_variance_of_latents_from_moments():
  latents = np.random.default_rng(0).normal(3, 2, (5, 4, 4, 2)).astype(np.float32)
  error = QuantizationError(
    np.tile(np.float32([2, 1]), (5, 1)), latents.mean((1, 2)), np.square(latents).mean((1, 2, 3))
  )
  variance = latents.astype(np.float64).var((0, 1, 2)).mean()
  assert error.latent_variance == pytest.approx(variance, rel=1e-5)
  assert error.relative == pytest.approx(np.array([2, 1]) / variance, rel=1e-5)


def test_one_line_for_a_terminal():
  values = {
    "psnr": 23.916,
    "ssim": 0.7402,
    "lpips": 0.26,
    "quantization_error": 0.1702,
    "codebook_utilization": 0.99,
    "codebook_perplexity": 700.0,
    "quantization_error/level_1": 0.9,
  }
  line = "PSNR 23.92  SSIM 0.740  LPIPS 0.260  quantization error 0.17  codes used 99.0%"
  assert short_line(values) == line
  generator = {"loss": 5.2134, "accuracy": 0.0412, "level_loss/level_1": 5.0}
  assert short_line(generator) == "loss 5.213  accuracy 4.1%"
  assert short_line({"psnr": float("inf"), "ssim": float("nan")}) == "PSNR –  SSIM –"
  assert len(short_line(generator | values).split("  ")) == 5
  assert short_line({}) == ""
