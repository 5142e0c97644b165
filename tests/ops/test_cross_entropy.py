"""The streamed cross-entropy against the materialised one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from coda_jax import sharding
from coda_jax.config import MeshSettings
from coda_jax.ops.cross_entropy import cross_entropy
from tests.collectives import collectives

N, V, D = 48, 80, 24


def inputs(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  hidden, table = (jnp.asarray(rng.normal(size=(n, D)), dtype) for n in (N, V))
  bias = jnp.asarray(rng.normal(size=V), jnp.float32)
  labels = jnp.asarray(rng.integers(0, V, N), jnp.int32)
  weights = jnp.asarray(rng.uniform(size=N) > 0.3, jnp.float32)
  return hidden, table, bias, labels, weights


def materialised(hidden, table, bias, labels, weights, smoothing):
  logits = jnp.matmul(hidden, table.T, precision="highest", preferred_element_type=jnp.float32)
  logits += bias
  target = (1 - smoothing) * jax.nn.one_hot(labels, V) + smoothing / V
  loss = -jnp.sum(target * jax.nn.log_softmax(logits), 1)
  return weights * loss, jnp.argmax(logits, 1) == labels


@functools.cache
def values(function, **settings):
  """Jitted: (losses, correct, gradients of a sum of losses to hidden, table and bias)."""

  @jax.jit
  def run(hidden, table, bias, labels, weights):
    def total(*arrays):
      loss, correct = function(*arrays, labels, weights=weights, **settings)
      return jnp.sum(loss * jnp.sin(jnp.arange(N))), (loss, correct)

    gradients, out = jax.grad(total, (0, 1, 2), has_aux=True)(hidden, table, bias)
    return *out, *gradients

  return run


def assert_close(ours, theirs, tolerance):
  for a, b in zip(ours, theirs, strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [None, 7])
def test_is_the_materialised_one(smoothing, chunk):
  ours = values(cross_entropy, label_smoothing=smoothing, chunk_size=chunk)(*inputs())
  theirs = values(materialised, smoothing=smoothing)(*inputs())
  assert_close(ours, theirs, 2e-6)


def test_bfloat16_has_float32_logits():
  ours = values(cross_entropy, label_smoothing=0.1, chunk_size=7)(*inputs(jnp.bfloat16))
  exact = [x.astype(jnp.float32) for x in inputs(jnp.bfloat16)[:3]]
  theirs = values(materialised, smoothing=0.1)(*exact, *inputs()[3:])
  assert ours[0].dtype == jnp.float32 and ours[2].dtype == jnp.bfloat16
  assert_close(ours[:2], theirs[:2], 2e-6)
  assert_close([x.astype(jnp.float32) for x in ours[2:]], theirs[2:], 1e-2)


def test_large_logits():
  hidden, table, bias, labels, weights = inputs()
  ours = values(cross_entropy, label_smoothing=0.1, chunk_size=7)(
    100 * hidden, table, bias, labels, weights
  )
  assert all(np.isfinite(x).all() for x in ours)


@pytest.mark.parametrize("axes", [(8, 1, 1), (2, 2, 2), (4, 1, 2), (1, 1, 8)])
def test_eight_devices_compute_the_same(axes):
  mesh = sharding.make_mesh(MeshSettings(*axes))
  specs = (("data", "fsdp"),), ("model",), ("model",), (("data", "fsdp"),), (("data", "fsdp"),)
  placed = [
    jax.device_put(x, NamedSharding(mesh, PartitionSpec(*s)))
    for x, s in zip(inputs(), specs, strict=True)
  ]
  function = values(cross_entropy, label_smoothing=0.1, chunk_size=3)
  with jax.set_mesh(mesh):
    ours = function(*placed)
    found = collectives(function.lower(*placed).compile().as_text())
  assert found and not any(c.in_loop or c.kind == "all-gather" for c in found), found
  assert_close(ours, values(materialised, smoothing=0.1)(*inputs()), 2e-6)


def test_never_holds_tokens_by_codes():
  n, v = 4096, 2048
  shapes = (n, D), (v, D), (v,)
  arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
  labels = jax.ShapeDtypeStruct((n,), jnp.int32)

  def total(hidden, table, bias, labels):
    return cross_entropy(
      hidden, table, bias, labels, label_smoothing=0.1, chunk_size=64
    ).loss.mean()

  compiled = jax.jit(jax.grad(total, (0, 1, 2))).lower(*arrays, labels).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < n * v * 4 / 8
