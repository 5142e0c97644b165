"""A MaskGIT of factors is one whose table has the sums of their rows."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays
from coda_jax import config as c
from coda_jax.errors import UserError
from coda_jax.generation import sampler
from coda_jax.generation.sampler import SamplerSettings
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from coda_jax.models.token_factors import TokenFactors, factors_by_level
from coda_jax.models.transform_quantizer import TransformConfig
from coda_jax.training.maskgit_step import bits_of_images, masked_loss
from tests.conftest import assert_close

# Levels of 3 x 4, of 5, and of 2 x 2 x 2 codes; each a grid of 2 x 2.
CONFIG = MaskGITConfig(
  16,
  2,
  2,
  2,
  (2, 2, 2),
  25,
  embedding="factors",
  level_codes=(12, 5, 8),
  factor_codes=(3, 4, 5, 2, 2, 2),
)
RNG = np.random.default_rng(0)
IDS = np.stack([RNG.integers(f, f + n, (8, 4)) for f, n in ((0, 12), (12, 5), (17, 8))], 1)
IDS = jnp.asarray(IDS.reshape(8, 12))
CLASSES = jnp.arange(8) % 3


def rows_of_codes():
  """The rows of every code's digits, code by code."""
  first = 0
  for level in ((3, 4), (5,), (2, 2, 2)):
    starts = np.cumsum([first, *level[:-1]])
    for digits in itertools.product(*map(range, level)):
      yield [s + d for s, d in zip(starts, digits, strict=True)]
    first += sum(level)


@functools.cache
def models() -> tuple[MaskGIT, MaskGIT]:
  """(of factors, with the table of all codes that makes the same of everything)."""
  ours = nnx.jit(lambda: MaskGIT(CONFIG, rngs=nnx.Rngs(0)))()
  graphdef, flat = arrays.split(ours)
  flat["embedding.digits"] *= 20  # else all codes are alike
  flat["bias"] = jnp.asarray(RNG.standard_normal(18), jnp.float32)
  rows = [np.array(r) for r in rows_of_codes()]
  sums = {
    "embedding.embedding": jnp.stack([flat["embedding.digits"][r].sum(0) for r in rows]),
    "bias": jnp.stack([flat["bias"][r].sum() for r in rows]),
  }
  config = dataclasses.replace(CONFIG, embedding="table", factor_codes=())
  structure, *_ = arrays.split(nnx.eval_shape(lambda: MaskGIT(config, rngs=nnx.Rngs(0))))
  theirs = {k: x for k, x in flat.items() if k != "embedding.digits"} | sums
  return arrays.merge(graphdef, flat), arrays.merge(structure, theirs)


def test_digits_come_back():
  factors = CONFIG.factors
  assert factors is not None and (factors.rows, factors.count) == (18, 3)
  digits = factors.digits(IDS)
  levels = jnp.broadcast_to(jnp.asarray(CONFIG.levels), IDS.shape)
  np.testing.assert_array_equal(factors.ids([*jnp.moveaxis(digits, -1, 0)], levels), IDS)
  assert digits[:, 4:8, 1:].max() == 0  # factors that the second level lacks
  ids = jnp.array([[11, 0, 0, 0, 12, 12, 12, 12, 17 + 6, 17, 17, 17]])
  assert factors.digits(ids)[0, [0, 8]].tolist() == [[2, 3, 0], [1, 1, 0]]


def test_digits_are_those_of_the_quantizer():
  """The first factor of a level is the most significant one there too."""
  q = TransformConfig(25, (2, 2, 2), 24, (12, 5, 8), (3, 4, 5, 2, 2, 2), (1, 2, 1, 1, 1, 1))
  assert [[f.codes for f in x] for x in q.levels] == [[3, 4], [5], [2, 2, 2]]
  assert [[f.number for f in x] for x in q.levels] == [[0, 1], [2], [3, 4, 5]]
  assert q.levels[0][1].coordinates == slice(1, 3)
  assert factors_by_level((12, 5, 8), (3, 4, 5, 2, 2, 2)) == [(3, 4), (5,), (2, 2, 2)]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_and_gradients(smoothing):
  settings = c.MaskingSettings(ratio="cosine", level_balance=0.5)

  @functools.partial(jax.jit, static_argnums=0)
  def run(graphdef, flat):
    def loss(flat):
      model = arrays.merge(graphdef, flat)
      args = IDS, CLASSES, jax.random.key(1), settings
      return masked_loss(model, *args, label_smoothing=smoothing)

    return jax.value_and_grad(loss, has_aux=True)(flat)

  (ours, sums), gradients = run(*arrays.split(models()[0]))
  (wanted, theirs), expected = run(*arrays.split(models()[1]))
  assert_close(ours, wanted, 1e-5)
  # Smoothing is the same over all codes of a level, and over those of each factor.
  assert_close(sums, theirs, 1e-5)
  for key in ("block_mid.qkv.kernel", "positions.0", "head2.bias"):
    assert_close(gradients[key], expected[key], 1e-5)
  of_codes = expected["embedding.embedding"]
  of_rows = np.zeros((18, 16), np.float32)
  for row, codes in zip(rows_of_codes(), of_codes, strict=True):
    of_rows[row] += codes
  assert_close(gradients["embedding.digits"], of_rows, 1e-5)


@pytest.mark.parametrize("order", ["uniform", "coarse_to_fine"])
def test_bits(order):
  run = nnx.jit(lambda m: bits_of_images(m, IDS, CLASSES, jax.random.key(2), order))
  ours, theirs = map(run, models())
  assert_close(ours, theirs, 1e-5)


def sampled(model, count=8, **settings):
  masked = np.full((count, 12), CONFIG.mask_id, np.int32)
  how = SamplerSettings(steps=4, **settings)
  run = sampler.sample(model, masked, np.arange(count) % 3, jax.random.key(3), how)
  return np.asarray(run.ids)


def test_the_likeliest_codes_are_sampled_alike():
  ours, theirs = (
    sampled(m, top_k=1, choice_temperature=0.0, order="coarse_to_fine") for m in models()
  )
  np.testing.assert_array_equal(ours, theirs)
  assert len({tuple(x) for x in ours}) == 3  # of three classes


@pytest.mark.slow
def test_codes_are_drawn_from_the_same_distribution():
  """Of the token that is revealed first, whose distribution is the model's of nothing known."""
  count, counts = 6000, []
  for m in models():
    ids = sampled(m, count, guidance=0.0, order="coarse_to_fine", choice_temperature=0.0)
    counts.append(np.bincount(ids[:, :4].ravel(), minlength=12) / (4 * count))
  assert np.abs(counts[0] - counts[1]).max() < 0.02 < counts[0].max()


def test_top_k_is_of_a_factor():
  ids = sampled(models()[0], top_k=2)
  digits = np.asarray(CONFIG.factors.digits(jnp.asarray(ids)))
  assert (ids >= np.repeat([0, 12, 17], 4)).all() and (ids < np.repeat([12, 17, 25], 4)).all()
  assert len(np.unique(digits[:, :4, 1])) > 1


def test_nothing_is_as_large_as_the_codes():
  """16 x 16 x 16 x 16 codes a token: neither weights nor logits of all of them."""
  config = dataclasses.replace(
    CONFIG, codebook_size=3 * 2**16, level_codes=(2**16,) * 3, factor_codes=(16,) * 12
  )
  graphdef, shapes = arrays.split(nnx.eval_shape(lambda: MaskGIT(config, rngs=nnx.Rngs(0))))
  assert max(x.size for x in shapes.values()) < 2**12

  @jax.jit
  def run(flat):
    model, key = arrays.merge(graphdef, flat), jax.random.key(0)
    ids, classes = jnp.full((8, 12), config.mask_id), jnp.zeros(8, jnp.int32)
    loss = lambda flat: masked_loss(
      arrays.merge(graphdef, flat), ids, classes, key, c.MaskingSettings()
    )[0]
    steps = SamplerSettings(steps=2).per_step(np.full(8, 12))
    form = sampler.form_of(SamplerSettings(steps=2), config, 8)
    index = jnp.arange(8, dtype=jnp.uint32)
    return jax.grad(loss)(flat), sampler.loop(model, ids, classes, None, index, key, steps, form)

  dims = re.findall(r"tensor<([0-9x]+)x[a-z]", run.lower(shapes).as_text())
  assert max(math.prod(map(int, x.split("x"))) for x in dims) < 2**16


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"factor_codes": ()}, "'factors'.*codes have none.*discretize"),
    ({"factor_codes": (3, 4, 5, 2, 2)}, "do not fit the levels' codes"),
  ],
)
def test_factors_that_do_not_fit(change, message):
  with pytest.raises(UserError, match=message):
    assert dataclasses.replace(CONFIG, **change).factors
  with pytest.raises(UserError, match="grids"):
    TokenFactors((1, 2, 2), (12, 5, 8), (3, 4, 5, 2, 2, 2))
