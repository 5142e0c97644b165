"""Transforms and whole quantizers, on latents whose statistics are known."""

import numpy as np
import pytest

from coda_jax.discretization import codebooks, transforms
from coda_jax.discretization.fit import fit
from coda_jax.errors import UserError

RNG = np.random.default_rng(0)
C = 4


def correlated(n, side=4):
  """Latents whose neighbours are alike, with channels of very different variance."""
  x = RNG.standard_normal((n, side // 2, 1, side // 2, 1, C)) * np.ones((1, 1, 2, 1, 2, 1))
  x = x.reshape(n, side, side, C) + 0.2 * RNG.standard_normal((n, side, side, C))
  return (x * [4, 2, 1, 0.5] + [1, 0, -1, 3]).astype(np.float32)


LATENTS, WHITE = correlated(200), RNG.standard_normal((64, 4, 4, C)).astype(np.float32)


def test_coordinates_are_uncorrelated_and_come_back():
  gradients = (WHITE * [1, 1, 3, 3]).astype(np.float32)
  t = transforms.fit_transform(LATENTS, gradients, 2)
  x = t.coordinates(LATENTS)
  covariance = np.cov(x.T, bias=True)
  np.testing.assert_allclose(covariance, np.diag(t.variances), atol=1e-3 * t.variances[0])
  assert (np.diff(t.variances) <= 0).all()
  blocks = transforms.to_blocks(LATENTS, 2).reshape(-1, 4 * C)
  np.testing.assert_allclose(x @ t.synthesis + t.mean, blocks, atol=1e-3)


def test_squared_error_of_coordinates_is_that_of_the_decoder():
  """A linear decoder J: Jᵀr for white r are the gradients."""
  decoder = RNG.standard_normal((C, C)) * [1, 2, 3, 4]
  noise = RNG.standard_normal((1000, 4, 4, C))
  t = transforms.fit_transform(LATENTS, (noise @ decoder.T).astype(np.float32), 1)
  error = RNG.standard_normal((100, C))
  ours, true = np.square(error @ t.analysis).sum(), np.square(error @ decoder).sum()
  np.testing.assert_allclose(ours, true, rtol=0.05)


@pytest.mark.parametrize("method", list(codebooks.METHODS))
def test_methods_keep_the_budget_and_beat_the_mean(method):
  found = fit(LATENTS, WHITE, bits=128.0, codes=16, method=method, block=None)
  config = found.config
  assert config.lookup == method
  assert 0.7 * 128 < config.bits <= 128
  assert max(config.level_codes) <= 16
  assert found.bound <= found.error < 0.4
  assert found.config.block == min(found.compared, key=lambda b: found.compared[b])
  assert list(found.compared) == ([1] if method == "token-bridge" else [1, 2, 4])


def test_more_bits_and_fitting_blocks_are_better():
  errors = [fit(LATENTS, WHITE, bits=b, codes=64, block=2).error for b in (32.0, 64.0, 128.0)]
  assert errors[0] > errors[1] > errors[2]
  found = fit(LATENTS, WHITE, bits=64.0, codes=64)
  assert found.compared[2] < found.compared[1], "neighbours are alike"


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"bits": 3.0, "block": 2}, "less than 1 for each of 4 blocks"),
    ({"bits": 32.0, "method": "token-bridge"}, "at least 4 for each latent, not 2"),
    ({"block": 3}, "4x4 cannot be cut into blocks of 3x3"),
    ({"codes": 2**12, "method": "vq", "bits": 400.0}, "too few for"),
    ({"latents": LATENTS[:1]}, "one image is too few"),
  ],
)
def test_bad_input_is_one_line(change, message):
  options = {"latents": LATENTS, "gradients": WHITE, "bits": 64.0, "codes": 64} | change
  with pytest.raises(UserError, match=message):
    fit(**options)
