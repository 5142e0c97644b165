"""The quantizer that `discretize` makes, on a small one made by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays, weights
from coda_jax.errors import UserError
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.transform_quantizer import (
  TransformConfig,
  TransformQuantizer,
  from_blocks,
  to_blocks,
)

# Blocks of 2x2 latents of one channel. Level 1: three levels of one coordinate times two of
# another. Level 2: four vectors of the last two.
CONFIG = TransformConfig(
  codebook_size=10,
  patch_sizes=(2, 2),
  code_dim=4,
  level_codes=(6, 4),
  factor_codes=(3, 2, 4),
  factor_dims=(1, 1, 2),
  block=2,
)
HALVES = np.array([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
PARAMETERS = {
  "mean": np.full(4, 0.5),
  "analysis": HALVES.T,
  "synthesis": HALVES,
  "codebooks.0": np.array([[-2.0], [0.0], [2.0]]),
  "codebooks.1": np.array([[-1.0], [1.0]]),
  "codebooks.2": np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]]),
}


def quantizer() -> TransformQuantizer:
  return weights.build(lambda: TransformQuantizer(CONFIG, rngs=nnx.Rngs(0)), PARAMETERS, "test")


encode = nnx.jit(lambda q, x: q.encode(x))
decode = nnx.jit(lambda q, ids: q.decode(ids))


def latents(*coordinates):
  """[1, 4, 4, 1] of the coordinates of four blocks."""
  blocks = np.array(coordinates).reshape(1, 2, 2, 4) @ HALVES + 0.5
  return jnp.asarray(from_blocks(blocks, 2), jnp.float32)


def test_blocks_come_back():
  x = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3).astype(np.float32)
  blocks = to_blocks(x, 2)
  assert blocks.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(blocks[1, 1, 2], x[1, 2:4, 4:6].ravel())
  np.testing.assert_array_equal(from_blocks(blocks, 2), x)


def test_ids_by_hand():
  x = latents((1.8, -3, 0.9, -0.8), (0.2, 5, -1.2, 1.1), (-1.1, 0.1, 2, 2), (-0.9, -0.1, -3, -3))
  first, second = encode(quantizer(), x)
  np.testing.assert_array_equal(first[0], [[4, 3], [1, 2]])  # 2 x first code + second
  np.testing.assert_array_equal(second[0], [[6 + 2, 6 + 1], [6 + 3, 6 + 0]])
  coordinates = (2, -1, 1, -1), (0, 1, -1, 1), (-2, 1, 1, 1), (0, -1, -1, -1)
  made = decode(quantizer(), [first, second])
  np.testing.assert_allclose(made, latents(*coordinates), atol=1e-6)
  coarse = decode(quantizer(), [first])
  np.testing.assert_allclose(
    coarse, latents(*((a, b, 0, 0) for a, b, *_ in coordinates)), atol=1e-6
  )


def test_call_encode_decode_and_values_agree():
  q, x = quantizer(), jax.random.normal(jax.random.key(0), (2, 4, 8, 1))
  out = nnx.jit(lambda q, x: q(x))(q, x)
  np.testing.assert_array_equal(out.ids[1], encode(q, x)[1])
  made = decode(q, out.ids)
  np.testing.assert_allclose(out.latents, made, atol=1e-6)
  np.testing.assert_allclose(out.level_mse[-1], jnp.square(made - x).mean(), rtol=1e-5)
  values = q.values()
  assert values.shape == (10, 4)
  summed = values[out.ids[0]] + values[out.ids[1]] + 0.5
  np.testing.assert_allclose(q.vectors(made), summed, atol=1e-6)
  some = np.array([7, 0, 9, 3])
  np.testing.assert_array_equal(q.values_of(some), values[some])
  vectors = jax.random.normal(jax.random.key(1), (3, 4))
  distances = np.linalg.norm(vectors[:, None] - values[6:], axis=-1)
  np.testing.assert_allclose(q.confidence(vectors), -distances, rtol=1e-5)
  scaled = np.square(q.embedding_values())
  np.testing.assert_allclose([scaled[:6].mean(), scaled[6:].mean()], 1, rtol=1e-5)
  again = encode(q, made)
  for a, b in zip(again, out.ids, strict=True):
    np.testing.assert_array_equal(a, b)


def gradients(x, weights_of_losses=(1.0, 1.0), **changes):
  """Of the sum of the latents and the loss, to parameters and latents."""
  q = quantizer()
  q.config = dataclasses.replace(CONFIG, **changes)
  graphdef, params = arrays.split(q)

  @jax.jit
  def run(params, x):
    out = arrays.merge(graphdef, params)(x)
    through, loss = weights_of_losses
    return through * out.latents.sum() + loss * out.vq_loss

  return jax.grad(run, (0, 1))(params, x)


def test_gradients_go_through_and_codes_can_train():
  x = jnp.ones((1, 4, 4, 1)) * 0.3
  codes, through = gradients(x, beta=0.0)
  np.testing.assert_allclose(through, 1)
  assert float(jnp.abs(codes["codebooks.0"]).max()) > 0


def test_beta_pulls_latents_to_their_codes():
  q, x = quantizer(), jax.random.normal(jax.random.key(0), (1, 4, 4, 1))
  distance = np.asarray(x - decode(q, encode(q, x)))
  for beta, changes in ((0.25, {}), (0.5, {"beta": 0.5})):
    _, pull = gradients(x, (0, 1), **changes)
    np.testing.assert_allclose(pull, 2 * beta * distance / x.size, atol=1e-6)


def test_the_rotation_trick_turns_the_gradient_of_each_block():
  q, x = quantizer(), jax.random.normal(jax.random.key(0), (1, 4, 4, 1))
  _, turned = gradients(x, (1, 0), gradient="rotation")
  blocks, values = (
    np.asarray(to_blocks(y, 2), np.float64).reshape(-1, 4) for y in (x, decode(q, encode(q, x)))
  )
  for block, value, found in zip(blocks, values, to_blocks(turned, 2).reshape(-1, 4), strict=True):
    a, b = block / np.linalg.norm(block), value / np.linalg.norm(value)
    r = (a + b) / np.linalg.norm(a + b)
    rotation = np.eye(4) - 2 * np.outer(r, r) + 2 * np.outer(b, a)
    scale = np.linalg.norm(value) / np.linalg.norm(block)
    np.testing.assert_allclose(found, scale * rotation.T @ np.ones(4), atol=1e-5)
  with pytest.raises(UserError, match="quantizer.gradient is 'none'"):
    dataclasses.replace(CONFIG, gradient="none")


def test_ids_of_another_level_add_nothing():
  q = quantizer()
  first, second = encode(q, latents(*[(2, 1, 1, 1)] * 4))
  steps = q.level_latents([first * 0 + CONFIG.codebook_size, second], (4, 4))
  np.testing.assert_allclose(steps[0], 0.5, atol=1e-6)  # a masked level: the mean
  np.testing.assert_allclose(q.level_latents([first, first], (4, 4))[1], 0, atol=1e-6)


def test_bits_count_each_level_by_its_codes():
  assert CONFIG.tokens == 8
  np.testing.assert_allclose(CONFIG.bits, 4 * np.log2(6) + 4 * 2)
  assert CONFIG.ranges == [(0, 6), (6, 10)]
  shared = QuantizerConfig(codebook_size=16, patch_sizes=(1, 2))
  assert shared.bits == 20 and shared.ranges == [(0, 16)] * 2


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"lookup": "cosine"}, "'cosine'; it is one of vq, lloyd-max"),
    ({"codebook_size": 9}, "do not fit each other"),
    ({"patch_sizes": (2, 3)}, "do not fit each other"),
    ({"factor_codes": (2, 3, 4, 1), "factor_dims": (1, 1, 1, 1)}, "do not fit each other"),
    ({"level_codes": (4, 6)}, "do not fit each other"),
    ({"factor_dims": (1, 1, 3)}, "do not fit each other"),
  ],
)
def test_bad_configs(change, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_bad_inputs_are_one_line():
  q = quantizer()
  first, second = encode(q, latents(*[(2, 1, 1, 1)] * 4))
  for call, message in (
    (lambda: q.encode(jnp.zeros((1, 3, 4, 1))), "3x4 cannot be cut into the tokenizer's blocks"),
    (lambda: q.decode([first, first]), "ids of level 2 go from 5 to 5; the codebook has 6 to 9"),
    (lambda: q.decode([]), "0 levels of ids"),
    (lambda: q.decode([first, second, second]), "3 levels of ids given; the tokenizer has 2"),
    (lambda: q.decode([first], (8, 8)), "do not fit latents of 8x8"),
  ):
    with pytest.raises(UserError, match=message):
      call()
