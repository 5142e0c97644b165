"""The transformer: sizes, what it depends on, and both embeddings."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays
from coda_jax.errors import UserError
from coda_jax.models.maskgit import Codes, MaskGIT, MaskGITConfig

CONFIG = MaskGITConfig(
  width=32, depth=2, heads=2, num_classes=3, patch_sizes=(1, 2, 4), codebook_size=64
)
MAR = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
L = MaskGITConfig(
  width=768, depth=24, heads=8, num_classes=1000, patch_sizes=MAR, codebook_size=16384
)


@functools.cache
def initialised(config):
  codes = jax.random.normal(jax.random.key(5), (config.codebook_size, config.code_dim))
  return nnx.jit(lambda: MaskGIT(config, codes=codes, rngs=nnx.Rngs(0)))()


def model(config=CONFIG, **settings):
  structure = nnx.eval_shape(lambda: MaskGIT(config, rngs=nnx.Rngs(0), **settings))
  return nnx.merge(nnx.split(structure)[0], nnx.state(initialised(config)))


def ids(config=CONFIG, batch=2):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.integers(0, config.codebook_size + 1, (batch, config.tokens)), jnp.int32)


@functools.cache
def call():
  return nnx.jit(lambda model, ids, condition: model.logits(model(ids, condition)))


def count(config):
  flat = arrays.of(nnx.eval_shape(lambda: MaskGIT(config, rngs=nnx.Rngs(0))))
  return sum(v.size for v in flat.values() if not isinstance(v, Codes))


@pytest.mark.slow
def test_large_counts_195_million():
  assert count(L) == pytest.approx(195e6, rel=0.02)


def test_small_is_smaller():
  small = dataclasses.replace(L, width=512, depth=12)
  assert 40e6 < count(small) < 60e6


@pytest.mark.parametrize("embedding", ["codes", "table"])
def test_shapes_and_initial_logits(embedding):
  config = dataclasses.replace(CONFIG, embedding=embedding)
  logits = call()(model(config), ids(), jnp.array([0, 3]))
  assert logits.shape == (2, 21, 64) and logits.dtype == jnp.float32
  assert 0 < logits.std() < 1.5  # near a uniform guess


def test_positions_levels_and_ids():
  assert CONFIG.tokens == 21 and CONFIG.mask_id == 64 and CONFIG.null_class == 3
  np.testing.assert_array_equal(CONFIG.levels, [0] + 4 * [1] + 16 * [2])
  assert L.tokens == 680


def test_depends_on_tokens_mask_positions_and_condition():
  x = jnp.full((2, 21), CONFIG.mask_id)
  same = call()(model(), x, jnp.array([1, 1]))
  np.testing.assert_allclose(same[0], same[1], rtol=1e-5, atol=1e-6)
  assert np.ptp(np.asarray(same[0]), axis=0).max() > 1e-3  # positions differ
  classes = call()(model(), x, jnp.array([1, 3]))
  assert np.abs(classes[0] - classes[1]).max() > 1e-4
  seen = call()(model(), x.at[0, 20].set(7), jnp.array([1, 1]))
  assert (np.abs(seen[0] - seen[1]).max(-1) > 0).all()  # every position sees the last


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient():
  def gradient(settings):
    graphdef, params, rest = nnx.split(model(**settings), nnx.Param, ...)

    @jax.jit
    def run(params):
      def loss(params):
        out = nnx.merge(graphdef, params, rest)(ids(), jnp.array([0, 1]))
        return jnp.square(out).mean(-1).std() + out[0, 0, 0]

      return jax.grad(loss)(params)

    return jax.tree.leaves(run(params))

  for a, b in zip(gradient({}), gradient({"remat": True}), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bfloat16():
  logits = call()(model(dtype=jnp.bfloat16), ids(), jnp.array([0, 3]))
  exact = call()(model(), ids(), jnp.array([0, 3]))
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, exact, atol=0.1)


def test_output_table_gives_the_logits():
  @nnx.jit
  def both(model, x):
    table, bias = model.output_table()
    return x @ table.T + bias, model.logits(x)

  a, b = both(model(), jax.random.normal(jax.random.key(0), (3, 32)))
  np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_scale_of_the_code_values_does_not_matter():
  small = nnx.clone(model())
  small.set_codes(0.01 * small.embedding.codes[...])
  args = ids(), jnp.array([0, 3])
  np.testing.assert_allclose(call()(small, *args), call()(model(), *args), atol=1e-5)


def test_set_codes():
  module = nnx.clone(model())
  module.set_codes(jnp.ones((64, 16)))
  assert (module.embedding.codes[...] == 1).all()
  with pytest.raises(UserError, match=r"shape \(63, 16\); the model is made for \(64, 16\)"):
    module.set_codes(jnp.ones((63, 16)))


@pytest.mark.parametrize(
  "change, message",
  [
    ({"depth": 3}, "depth is 3; it must be even"),
    ({"heads": 5}, "width=32 is not a multiple of model.heads=5"),
    ({"embedding": "none"}, "embedding is 'none'"),
    ({"attention": "flash"}, "attention is 'flash'"),
  ],
)
def test_bad_configs(change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(CONFIG, **change)
