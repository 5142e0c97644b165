"""Group normalisation, with swish behind it where asked, and its gradient for CPUs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax.ops.platform import platform
from coda_jax.ops.recompute import after

_EPS = 1e-6


def group_norm(
  x: Float[Array, "b h w c"],
  scale: Float[Array, "c"],
  bias: Float[Array, "c"],
  *,
  groups: int,
  swish: bool = False,
) -> Float[Array, "b h w c"]:
  """GroupNorm, eps 1e-6, statistics in float32.

  Sums run over positions first and over a group's channels last, so that channels stay in lanes.
  They read x once: each channel's variance is that of its distances from its first pixel, which
  keeps E[d²] − E[d]² from cancelling where a channel's mean is far from 0.
  """
  # On CPUs the compiler's own gradient would hold four images more.
  run = _with_gradient if platform() == "cpu" else _run
  return run(groups, swish, x, scale, bias)


def _group_mean(x: jax.Array, groups: int) -> jax.Array:
  """Mean over each group's channels, at every one of them, of x [b, 1, 1, c]."""
  size = x.shape[-1] // groups
  means = x.reshape(len(x), groups, size).mean(-1)
  return jnp.repeat(means, size, axis=-1)[:, None, None]


def _moments(y: jax.Array, groups: int) -> tuple[jax.Array, jax.Array]:
  """Mean and 1 / standard deviation of y's groups, [b, 1, 1, c]."""
  first = jax.lax.stop_gradient(y[:, :1, :1])
  distance = (y - first).mean((1, 2), keepdims=True)
  variance = jnp.square(y - first).mean((1, 2), keepdims=True) - jnp.square(distance)
  mean = _group_mean(first + distance, groups)
  variance = _group_mean(variance + jnp.square(first + distance - mean), groups)
  return mean, jax.lax.rsqrt(jnp.maximum(variance, 0.0) + _EPS)


def _normalise(swish, x, scale, bias, mean, inverse):
  factor = inverse * scale
  y = (x.astype(jnp.float32) * factor + (bias - mean * factor)).astype(x.dtype)
  return jax.nn.silu(y) if swish else y


def _run(groups, swish, x, scale, bias):
  return _normalise(swish, x, scale, bias, *_moments(x.astype(jnp.float32), groups))


_with_gradient = jax.custom_vjp(_run, nondiff_argnums=(0, 1))


def _forward(groups, swish, x, scale, bias):
  moments = _moments(x.astype(jnp.float32), groups)
  return _normalise(swish, x, scale, bias, *moments), (x, (scale, bias, *moments))


def _backward(groups, swish, kept, cotangent):
  """With n = (x − mean) / std, y = n scale + bias, g = dy scale and means over groups ⟨·⟩:

  dx = (g − ⟨g⟩ − n ⟨g n⟩) / std,   dy = cotangent σ(y) (1 + y (1 − σ(y))) behind a swish.
  """
  x, dy = kept[0].astype(jnp.float32), cotangent.astype(jnp.float32)
  # Late, or the compiler would take x − first and y from the forward pass and hold them.
  first, (scale, bias, mean, inverse) = after(cotangent, (x[:, :1, :1], kept[1]))
  factor = inverse * scale
  if swish:
    y = x * factor + (bias - mean * factor)
    sigmoid = jax.nn.sigmoid(y)
    dy = dy * (sigmoid * (1 + y * (1 - sigmoid)))
  pixels = x.shape[1] * x.shape[2]
  total = dy.sum((1, 2), keepdims=True)
  total_n = ((dy * (x - first)).sum((1, 2), keepdims=True) - (mean - first) * total) * inverse
  mean_g, mean_gn = (_group_mean(t * scale, groups) / pixels for t in (total, total_n))
  dx = dy * factor - (mean_g + (x - mean) * (inverse * mean_gn)) * inverse
  return dx.astype(cotangent.dtype), total_n.sum((0, 1, 2)), total.sum((0, 1, 2))


_with_gradient.defvjp(_forward, _backward)
