"""Rows of an array, a chunk at a time."""

import jax
import jax.numpy as jnp


class Chunks:
  """Cuts n rows into chunks, as even as can be.

  Args:
    x: [n, ...]; its number of rows counts.
    size: rows of a chunk, at most.
  """

  def __init__(self, x: jax.Array, size: int):
    self.n = x.shape[0]
    self.count = -(-self.n // max(1, min(self.n, size)))
    self.size = -(-self.n // self.count)

  def split(self, x: jax.Array) -> jax.Array:
    """[n, ...] to [count, size, ...], padded with zeros at the end."""
    pad = self.count * self.size - self.n
    x = jnp.pad(x, ((0, pad),) + ((0, 0),) * (x.ndim - 1))
    return x.reshape(self.count, self.size, *x.shape[1:])

  def join(self, x: jax.Array) -> jax.Array:
    """Inverse of `split`."""
    return x.reshape(-1, *x.shape[2:])[: self.n]

  def map(self, f, *xs: jax.Array):
    """`f` over the chunks of `xs`, its results joined."""
    ys = jax.lax.map(lambda x: f(*x), tuple(map(self.split, xs)))
    return jax.tree.map(self.join, ys)
