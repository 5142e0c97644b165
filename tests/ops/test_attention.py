"""Attention head by head against `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.ops.attention import attention


def qkv(dtype, keys=7):
  rng = np.random.default_rng(0)
  shapes = (2, 5, 3, 8), (2, keys, 3, 8), (2, keys, 3, 8)
  return [jnp.asarray(3 * rng.normal(size=s), dtype) for s in shapes]


def run(implementation, xs):
  def loss(*xs):
    y = attention(*xs, implementation)
    return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

  (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*xs)
  return y, *gradients


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 0.05)])
@pytest.mark.parametrize("implementation", ["per_head", None])
def test_values_and_gradients(implementation, dtype, tolerance):
  wanted = run("xla", qkv("float32"))
  for x, y in zip(run(implementation, qkv(dtype)), wanted, strict=True):
    assert x.dtype == dtype and x.shape == y.shape
    np.testing.assert_allclose(
      np.asarray(x, np.float32), y, rtol=0, atol=tolerance * np.abs(y).max()
    )


def test_one_cpu_never_holds_the_scores_of_all_heads():
  xs = [jax.ShapeDtypeStruct((8, 100, 4, 16), jnp.float32)] * 3
  text = jax.jit(attention, static_argnums=3).lower(*xs, None).as_text()
  assert "100x100" in text and "32x100x100" not in text and "8x4x100x100" not in text


def test_devices_share_the_batch():
  mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
  xs = [jax.ShapeDtypeStruct((8, 100, 4, 16), jnp.float32)] * 3
  with jax.set_mesh(mesh):
    text = jax.jit(attention, static_argnums=3).lower(*xs, None).as_text()
  assert "8x4x100x100" in text
