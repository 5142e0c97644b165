"""Group normalisation against float64, and the CPU's own gradient against the compiler's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.ops import group_norm as ops
from coda_jax.ops.group_norm import group_norm

GROUPS = 4


def draw():
  """Two images whose channels' means lie far from 0, with weights and a cotangent."""
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 6, 5, 16)) * rng.uniform(0.1, 3, 16) + 30 * rng.normal(size=16)
  scale, bias, g = rng.normal(size=16), rng.normal(size=16), rng.normal(size=x.shape)
  return [jnp.asarray(t, jnp.float32) for t in (x, scale, bias, g)]


def exact(x, scale, bias, swish, groups=GROUPS):
  x, scale, bias = (np.asarray(t, np.float64) for t in (x, scale, bias))
  grouped = x.reshape(*x.shape[:3], groups, -1)
  mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (np.mean, np.var))
  y = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
  return y / (1 + np.exp(-y)) if swish else y


@pytest.fixture(params=["cpu", "tpu"])
def form(request, monkeypatch):
  """The norm as it is on CPUs, and as elsewhere."""
  monkeypatch.setattr(ops, "platform", lambda: request.param)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("swish", [False, True])
def test_values_are_those_of_float64(swish):
  *args, _ = draw()
  y = group_norm(*args, groups=GROUPS, swish=swish)
  np.testing.assert_allclose(y, exact(*args, swish), rtol=0, atol=2e-5)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("swish", [False, True])
def test_the_gradient_is_the_derivative(swish):
  """Of inputs, scale and bias, in random directions, against differences in float64."""
  *args, g = draw()
  pull = jax.vjp(lambda *args: group_norm(*args, groups=GROUPS, swish=swish), *args)[1]
  rng = np.random.default_rng(1)
  for i, gradient in enumerate(pull(g)):
    direction = rng.normal(size=gradient.shape)
    ends = []
    for sign in (1, -1):
      moved = [np.asarray(t, np.float64) for t in args]
      moved[i] = moved[i] + sign * 1e-5 * direction
      ends.append(exact(*moved, swish))
    slope = np.sum(np.asarray(g, np.float64) * (ends[0] - ends[1])) / 2e-5
    np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_gradients_agree_with_the_compilers(dtype, tolerance):
  x, scale, bias, g = draw()
  x, g = x.astype(dtype), g.astype(dtype)
  ours, compilers = (
    jax.jit(lambda *args, f=f: jax.vjp(lambda *args: f(GROUPS, True, *args), *args)[1](g))(
      x, scale, bias
    )
    for f in (ops._on_cpu, ops._fused)
  )
  for a, b in zip(ours, compilers, strict=True):
    assert a.dtype == b.dtype
    a, b = (np.asarray(t, np.float64) for t in (a, b))
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 1e-5), (1000.0, 1e-3)])
def test_far_from_zero(mean, tolerance):
  """Against float64; one sweep over E[x²] − E[x]² would be off by 0.4 at a mean of 1000."""
  rng = np.random.default_rng(0)
  x = (mean + rng.normal(size=(2, 16, 24, 8)) * rng.uniform(1, 3, 8)).astype(np.float32)
  scale, bias = jnp.ones(8), jnp.zeros(8)
  y = group_norm(jnp.asarray(x), scale, bias, groups=2)
  np.testing.assert_allclose(y, exact(x, scale, bias, swish=False, groups=2), atol=tolerance)
