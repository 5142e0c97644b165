"""Transforms and whole quantizers, on latents whose statistics are known."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays, weights
from coda_jax.discretization import codebooks, transforms
from coda_jax.discretization import residual as residual_module
from coda_jax.discretization.fit import fit
from coda_jax.discretization.residual import fit_residual
from coda_jax.errors import UserError
from coda_jax.models.quantizer import QuantizerConfig, ResidualQuantizer

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


def test_a_codebook_has_no_more_codes_than_k_means_can_find_in_time(monkeypatch):
  monkeypatch.setattr(codebooks, "_MOST_CODES", 100)
  config = fit(LATENTS, WHITE, bits=200.0, codes=256, method="vq", block=1).config
  factors = [f for level in config.levels for f in level]
  assert all(f.codes <= 16 for f in factors if f.coordinates.stop - f.coordinates.start > 1)
  assert max(config.level_codes) > 64 and len(factors) > len(config.levels)


def test_more_bits_and_fitting_blocks_are_better():
  errors = [fit(LATENTS, WHITE, bits=b, codes=64, block=2).error for b in (32.0, 64.0, 128.0)]
  assert errors[0] > errors[1] > errors[2]
  found = fit(LATENTS, WHITE, bits=64.0, codes=64)
  assert found.compared[2] < found.compared[1], "neighbours are alike"


@pytest.mark.parametrize(("images", "most"), [(200, 256), (64, 16), (8, 6)])
def test_few_samples_make_small_codebooks_of_which_a_token_holds_several(images, most):
  config = fit(LATENTS[:images], WHITE, bits=200.0, codes=256, method="vq", block=1).config
  factors = [f for level in config.levels for f in level]
  several = [f.codes for f in factors if f.coordinates.stop - f.coordinates.start > 1]
  assert max(several, default=0) <= most
  assert len(factors) > len(config.levels) or most == 256
  assert max(config.level_codes) > 64 and 160 < config.bits <= 200, config


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"bits": 3.0, "block": 2}, "less than 1 for each of 4 blocks"),
    ({"bits": 32.0, "method": "token-bridge"}, "at least 4 for each latent, not 2"),
    ({"block": 3}, "4x4 cannot be cut into blocks of 3x3"),
    ({"latents": LATENTS[:1]}, "one image is too few"),
  ],
)
def test_bad_input_is_one_line(change, message):
  options = {"latents": LATENTS, "gradients": WHITE, "bits": 64.0, "codes": 64} | change
  with pytest.raises(UserError, match=message):
    fit(**options)


SIZES, BITS = (1, 2, 4), 21 * 5.0  # 21 tokens of 32 codes


@pytest.fixture(scope="module")
def residual():
  """The paper's quantizer for a decoder that sees two channels three times as well."""
  gradients = (WHITE * [1, 1, 3, 3]).astype(np.float32)
  config, parameters = fit_residual(LATENTS, gradients, bits=BITS, codes=1024, patch_sizes=SIZES)
  make = lambda: ResidualQuantizer(config, rngs=nnx.Rngs(0))
  quantizer = weights.build(make, parameters, "the quantizer")
  return quantizer, gradients


def test_the_papers_quantizer_from_data_reduces_the_error_at_every_level(residual):
  quantizer, _ = residual
  assert quantizer.config.lookup == "attention" and quantizer.config.bits == BITS
  assert set(arrays.of(quantizer)) == set(
    arrays.of(ResidualQuantizer(quantizer.config, rngs=nnx.Rngs(1)))
  )
  ids = arrays.jit_module(lambda q, x: q.encode(x))(quantizer)(LATENTS)
  levels = arrays.jit_module(lambda q, ids: q.level_latents(ids, (4, 4)))(quantizer)(ids)
  made = np.cumsum(levels, axis=0)
  errors = [np.square(LATENTS - m).mean() / LATENTS.var((0, 1, 2)).mean() for m in made]
  assert errors[0] > errors[1] > errors[2] and errors[2] < 0.2
  assert len(np.unique(np.concatenate([np.ravel(i) for i in ids]))) > 0.9 * 32


def test_its_attention_takes_the_nearest_code_as_the_decoder_sees_it(residual):
  quantizer, gradients = residual
  x = jnp.asarray(LATENTS.reshape(-1, C)[:500])
  metric = transforms.fit_transform(LATENTS, gradients, 1).analysis
  codes = np.asarray(quantizer.values())
  distances = np.square((x[:, None] - codes) @ metric).sum(-1)
  found = np.take_along_axis(distances, np.asarray(quantizer.ids(x, quantizer.codes()))[:, None], 1)
  assert np.mean(found[:, 0] <= 1.001 * distances.min(1)) > 0.95
  assert found.mean() < 1.02 * distances.min(1).mean()
  likely = np.asarray(quantizer.confidence(x)).max(1)
  assert 0.1 < np.median(likely) < 0.999, "the softmax neither averages all codes nor is hard"


def test_least_squares_keeps_no_tokens_by_codes():
  size, config = 512, QuantizerConfig(512, SIZES, code_dim=C, lookup="euclidean")
  chain, _ = arrays.split(ResidualQuantizer(config, rngs=nnx.Rngs(0)))
  ids = [np.zeros((3, 2, p, p), np.int32) for p in SIZES]
  values, x = np.zeros((size, C), np.float32), np.zeros((3, 2, 4, 4, C), np.float32)
  program = str(
    jax.make_jaxpr(lambda *a: residual_module._least_squares(chain, *a))(values, ids, x)
  )
  shapes = [list(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", program)]
  assert max(map(math.prod, shapes)) < 3 * 2 * 21 * size / 2


@pytest.mark.slow
def test_fit_measures_the_papers_quantizer_too():
  sizes = (2, 4, 4)  # the last side twice
  found = fit(LATENTS, WHITE, bits=36 * 5.0, codes=1024, method="coda", patch_sizes=sizes)
  assert found.config.codebook_size == 32 and not found.compared
  assert found.bound < found.error < 0.4


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({}, "latents of 4x4 need --patch-sizes up to 4 that end with 4"),
    ({"patch_sizes": (1, 2)}, "end with 4"),
    ({"patch_sizes": SIZES, "bits": 40.0}, "3 codes for each of 21 tokens"),
    ({"patch_sizes": (8, 4)}, "up to 4"),
    ({"patch_sizes": SIZES, "latents": LATENTS[:4]}, "too few for"),
  ],
)
def test_bad_input_of_the_papers_quantizer_is_one_line(change, message):
  options = {"latents": LATENTS, "gradients": WHITE, "bits": BITS, "codes": 64} | change
  with pytest.raises(UserError, match=message):
    fit(method="coda", **options)
