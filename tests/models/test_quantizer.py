import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import weights
from coda_jax.errors import UserError
from coda_jax.models.quantizer import QuantizerConfig, ResidualQuantizer
from tests import tiny

ATTENTION = dataclasses.replace(tiny.QUANTIZER, patch_sizes=(1, 2, 4))
EUCLIDEAN = dataclasses.replace(ATTENTION, lookup="euclidean")


def make(config, seed=0):
  params = tiny.random_params(lambda: ResidualQuantizer(config, rngs=nnx.Rngs(0)), seed)
  params["codebook"] = np.array(latents(len(params["codebook"]), seed=7))
  return weights.build(lambda: ResidualQuantizer(config, rngs=nnx.Rngs(0)), params, "test")


def latents(*shape, seed=3):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.standard_normal((*shape, 16)), jnp.float32)


@pytest.mark.parametrize("config", [ATTENTION, EUCLIDEAN], ids=["attention", "euclidean"])
@pytest.mark.parametrize("size", [(4, 4), (6, 3)])
def test_encode_decode_and_call_agree(config, size):
  quantizer = make(config)
  x = latents(1, *size)
  out = tiny.quantize(quantizer, x)
  ids = nnx.jit(lambda quantizer, x: quantizer.encode(x))(quantizer, x)
  for a, b in zip(out.ids, ids, strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(quantizer.decode(out.ids), out.latents, atol=1e-5)
  first = quantizer.decode(out.ids[:2], size)
  error = jnp.square(first - x).mean()
  np.testing.assert_allclose(out.level_mse[1], error, rtol=1e-4)


def test_level_sizes_follow_the_rule():
  config = QuantizerConfig(codebook_size=4, patch_sizes=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
  assert config.level_sizes(16, 16) == [(p, p) for p in config.patch_sizes]
  wide = config.level_sizes(8, 32)
  assert wide[0] == (1, 2) and wide[2] == (2, 6) and wide[-1] == (8, 32)
  assert config.level_sizes(1, 1) == [(1, 1)] * 10
  assert config.tokens == 680


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"codebook_size": 0}, "codebook_size is 0"),
    ({"lookup": "cosine"}, "'cosine'; it is one of attention, euclidean"),
    ({"norm": "batch"}, "'batch'; it is one of rms, layer, none"),
    ({"patch_sizes": ()}, "patch_sizes"),
    ({"patch_sizes": (0, 4)}, "patch_sizes"),
    ({"chunk_size": 0}, "chunk_size is 0"),
  ],
)
def test_bad_settings(change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(ATTENTION, **change)


def test_foreign_ids():
  quantizer = make(EUCLIDEAN)
  ids = [jnp.zeros((1, p, p), jnp.int32) for p in (2, 3, 6)]
  with pytest.raises(UserError, match="give size="):
    quantizer.decode(ids[:2])
  with pytest.raises(UserError, match="0 levels of ids given; the tokenizer has 3"):
    quantizer.decode([])
