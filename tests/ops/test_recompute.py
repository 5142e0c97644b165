"""What is computed again and what only once: values, gradients, and the memory that it saves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.ops.group_norm import group_norm
from coda_jax.ops.recompute import after, compute_once, recompute

pytestmark = pytest.mark.usefixtures("optimized")  # they are about what the compiler does


def convolve(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def chain(wrap, x, kernels):
  """Layers of an activation and a convolution."""
  for kernel in kernels:
    x = wrap(lambda x, kernel=kernel: convolve(jnp.sin(x), kernel))(x)
  return jnp.sum(x**2)


def normed(x):
  mean = x.mean((1, 2), keepdims=True)
  variance = jnp.square(x - mean).mean((1, 2), keepdims=True)
  return jax.nn.silu((x - mean) * jax.lax.rsqrt(variance + 1e-6))


def summed(wrap, x, kernels):
  """A sum of two convolutions and a bias, normed, activated and convolved."""
  y = wrap(convolve(x, kernels[0]) + convolve(x, kernels[1])) + jnp.arange(16.0)
  return jnp.sum(convolve(normed(y), kernels[2]))


def residual(wrap, x, kernels):
  """Blocks of two normed, activated convolutions, cut as the VAE's are."""

  def normed(x, kernel):
    return group_norm(x, kernel[0, 0, 0], kernel[1, 1, 0], groups=4, swish=True)

  for first, second in zip(kernels[::2], kernels[1::2], strict=True):
    carry = wrap(lambda x, k=first: (x, convolve(normed(x, k), k)))(x)
    x = wrap(lambda carry, k=second: carry[0] + convolve(normed(carry[1], k), k))(carry)
  return jnp.sum(x**2)


def draw(size=8):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(1, size, size, 16)), jnp.float32)
  return x, [jnp.asarray(rng.normal(size=(3, 3, 16, 16)) / 12, jnp.float32) for _ in range(4)]


@pytest.mark.parametrize(
  "function, wrap", [(chain, recompute), (residual, recompute), (summed, compute_once)]
)
def test_values_and_gradients_are_those_of_the_plain_function(function, wrap):
  args = draw()
  plain, ours = (
    jax.jit(jax.value_and_grad(functools.partial(function, w), (0, 1)))(*args)
    for w in (lambda f: f, wrap)
  )
  for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())


def later(x):
  return after(x + 1, x)


@pytest.mark.parametrize("wrap", [compute_once, later])
def test_once_and_after_are_the_identity_to_the_bit(wrap):
  x = jnp.asarray([[0.0, -0.0, 1e-30], [-1e30, 3.0, 1 / 3]])
  y, tangent = jax.jvp(wrap, (x,), (x,))
  assert np.asarray(y).tobytes() == np.asarray(tangent).tobytes() == np.asarray(x).tobytes()
  assert wrap(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16
  special = jnp.asarray([1.0, jnp.inf, -jnp.inf, jnp.nan])
  np.testing.assert_array_equal(wrap(special), special)  # one element's NaN is not the others'


@pytest.mark.parametrize("function, wrap", [(chain, recompute), (summed, compute_once)])
def test_the_gradient_holds_less_on_cpus(function, wrap):
  """XLA:CPU keeps both summands of a sum, and all activations, unless it is told not to."""
  x, kernels = draw(size=64)

  def images(wrap):
    gradient = jax.jit(jax.grad(functools.partial(function, wrap), (0, 1)))
    memory = gradient.lower(x, kernels).compile().memory_analysis()
    return memory.temp_size_in_bytes / x.nbytes

  assert images(wrap) < images(lambda f: f) - 0.9


def test_kernels_are_transposed_when_they_are_needed():
  """XLA:CPU makes the transposed copies of all kernels first, and holds them, if they can be."""
  kernel = jax.ShapeDtypeStruct((3, 3, 64, 64), jnp.float32)
  x = jax.ShapeDtypeStruct((1, 8, 8, 64), jnp.float32)
  gradient = jax.jit(jax.grad(functools.partial(chain, recompute)))
  memory = gradient.lower(x, [kernel] * 8).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 4 * kernel.size * 4


def test_a_block_starts_when_its_cotangents_are_there_and_holds_each_once():
  x, kernels = draw(size=64)
  gradient = jax.jit(jax.grad(functools.partial(residual, recompute), (0, 1)))
  memory = gradient.lower(x, kernels * 2).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 14 * x.nbytes
