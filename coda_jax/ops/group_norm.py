"""Group normalisation, with swish behind it where asked; for CPUs with its own gradient."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax.ops.platform import platform
from coda_jax.ops.recompute import after, compute_once

_EPS = 1e-6


def group_norm(
  x: Float[Array, "b h w c"],
  scale: Float[Array, "c"],
  bias: Float[Array, "c"],
  *,
  groups: int,
  swish: bool = False,
) -> Float[Array, "b h w c"]:
  """GroupNorm, eps 1e-6, statistics in float32."""
  run = _on_cpu if platform() == "cpu" else _fused
  return run(groups, swish, x, scale, bias)


def _group_mean(x: jax.Array, groups: int) -> jax.Array:
  """Mean over each group's channels, at every one of them, of x [b, n, 1, c]."""
  grouped = x.reshape(*x.shape[:-1], groups, -1)
  return jnp.broadcast_to(grouped.mean(-1, keepdims=True), grouped.shape).reshape(x.shape)


def _fused(groups, swish, x, scale, bias):
  """As compilers that fuse everything like it: x is read once for its moments.

  Sums run over positions first and over a group's channels last, so that channels stay in lanes.
  Each channel's variance is that of its distances from its first pixel, which keeps E[d²] − E[d]²
  from cancelling where a channel's mean is far from 0.
  """
  y = x.astype(jnp.float32)
  first = jax.lax.stop_gradient(y[:, :1, :1])
  distance = (y - first).mean((1, 2), keepdims=True)
  variance = jnp.square(y - first).mean((1, 2), keepdims=True) - jnp.square(distance)
  mean = _group_mean(first + distance, groups)
  variance = _group_mean(variance + jnp.square(first + distance - mean), groups)
  factor = jax.lax.rsqrt(jnp.maximum(variance, 0.0) + _EPS) * scale
  y = (y * factor + (bias - mean * factor)).astype(x.dtype)
  return jax.nn.silu(y) if swish else y


def _forward(groups, swish, x, scale, bias):
  """As XLA's CPU compiler likes it, and what the backward pass needs.

  Its sums read what they sum from memory, but for x − c with a c that is there before: two sweeps
  over x, where `_fused` would take three and an image more. What belongs to channels is computed
  once, and not again for every pixel.
  """
  y = x.astype(jnp.float32)
  mean = _group_mean(y.mean((1, 2), keepdims=True), groups)
  variance = _group_mean(jnp.square(y - mean).mean((1, 2), keepdims=True), groups)
  inverse = jax.lax.rsqrt(variance + _EPS)
  factor = inverse * scale
  kept = compute_once(jnp.concatenate([factor, bias - mean * factor, mean, inverse], 1))
  y = (y * kept[:, :1] + kept[:, 1:2]).astype(x.dtype)
  return jax.nn.silu(y) if swish else y, (x, kept)


def _backward(groups, swish, kept, cotangent):
  """With n = (x − mean) / std, y = n scale + bias, g = dy scale and means over groups ⟨·⟩:

  dx = (g − ⟨g⟩ − n ⟨g n⟩) / std,   dy = cotangent σ(y) (1 + y (1 − σ(y))) behind a swish.

  The compiler's own gradient would hold four images more.
  """
  x, dy = kept[0].astype(jnp.float32), cotangent.astype(jnp.float32)
  # Late, or the compiler would take x − mean and y from the forward pass and hold them.
  first, kept = after(cotangent, (x[:, :1, :1], kept[1]))
  factor, shift, mean, inverse = jnp.split(kept, 4, 1)
  if swish:
    y = x * factor + shift
    sigmoid = jax.nn.sigmoid(y)
    dy = dy * (sigmoid * (1 + y * (1 - sigmoid)))
  total = dy.sum((1, 2), keepdims=True)
  total_x = (dy * (x - first)).sum((1, 2), keepdims=True) - (mean - first) * total
  both = jnp.concatenate([total, total_x * jnp.square(inverse)], 1) * factor
  offset, slope = jnp.split(_group_mean(both, groups) / (x.shape[1] * x.shape[2]), 2, 1)
  dx = dy * factor - (offset + (x - mean) * slope)
  return dx.astype(cotangent.dtype), (total_x * inverse).sum((0, 1, 2)), total.sum((0, 1, 2))


_on_cpu = jax.custom_vjp(lambda *args: _forward(*args)[0], nondiff_argnums=(0, 1))
_on_cpu.defvjp(_forward, _backward)
