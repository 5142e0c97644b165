"""Programs for TPUs and GPUs are made here, where neither is: each has its platform's form."""

import jax
import jax.numpy as jnp
import numpy as np

from coda_jax.ops.attention import attention
from coda_jax.ops.codebook_lookup import attention_lookup, euclidean_lookup
from coda_jax.ops.cross_entropy import cross_entropy
from tests.exporting import check

CODES = 8192  # two tiles of a CPU's backward pass


def random(*shape):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def test_look_up_and_its_gradients():
  def loss(q, k, v):
    found = attention_lookup(q, k, v)
    return jnp.sum(jnp.sin(found.z)) + found.entropy_loss, found.ids

  gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
  texts = check(gradients, random(80, 4), random(CODES, 4), random(CODES, 3))
  for platform, text in texts.items():
    # TPUs multiply with one-hot rows. Only CPUs take maxima of blocks and tiles of codes.
    assert ("stablehlo.scatter" in text) == (platform != "tpu"), platform
    assert ("gather" in text) == (platform != "tpu"), platform
    assert ("16x512xf32" in text) == (platform == "cpu"), platform
    assert ("tensor<4x4096xf32>" in text) == (platform == "cpu"), platform


def test_nearest_codes():
  texts = check(euclidean_lookup, random(80, 4), random(CODES, 4), tolerance=0)
  assert {p for p, text in texts.items() if "16x512xf32" in text} == {"cpu"}


def test_cross_entropy_has_one_form():
  def loss(hidden, table, bias, labels):
    return cross_entropy(hidden, table, bias, labels, chunk_size=7).loss.mean()

  gradients = jax.value_and_grad(loss, (0, 1, 2))
  texts = check(gradients, random(20, 4), random(50, 4), random(50), jnp.arange(20))
  assert len(set(texts.values())) == 1


def test_attention():
  def loss(q, k, v):
    return jnp.sum(jnp.sin(attention(q, k, v)))

  texts = check(jax.value_and_grad(loss, (0, 1, 2)), *(random(2, 5, 3, 4) for _ in range(3)))
  assert {p for p, text in texts.items() if "stablehlo.while" in text} == {"cpu"}


def test_a_program_for_several_platforms():
  q, k = random(80, 4), random(CODES, 4)
  both = jax.export.export(jax.jit(euclidean_lookup), platforms=["cpu", "tpu"])(q, k)
  np.testing.assert_array_equal(both.call(q, k), euclidean_lookup(q, k))
