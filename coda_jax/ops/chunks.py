"""Rows of an array, a chunk at a time."""

import math

import jax
import jax.numpy as jnp


class Chunks:
  """Cuts n rows into chunks that hold equally many rows of every device.

  Under `jit` the rows may be sharded over any mesh axes. The mesh is the one set with
  `jax.set_mesh`, or that of the arguments.

  Args:
    x: [n, ...]; its number of rows and its mesh count.
    size: rows of a chunk on each device, at most.
  """

  def __init__(self, x: jax.Array, size: int):
    self.n = x.shape[0]
    self.shards = math.gcd(self.n, math.prod(jax.typeof(x).sharding.mesh.shape.values()))
    local = self.n // self.shards
    self.count = -(-local // max(1, min(local, size)))
    self.size = -(-local // self.count)  # as even as can be

  def split(self, x: jax.Array) -> jax.Array:
    """[n, ...] to [count, shards * size, ...], zeros where a device's share ran out."""
    x = x.reshape(self.shards, -1, *x.shape[1:])
    pad = self.count * self.size - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(self.shards, self.count, self.size, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(self.count, -1, *x.shape[3:])

  def join(self, x: jax.Array) -> jax.Array:
    """Inverse of `split`."""
    x = x.reshape(self.count, self.shards, self.size, *x.shape[2:]).swapaxes(0, 1)
    x = x.reshape(self.shards, -1, *x.shape[3:])[:, : self.n // self.shards]
    return x.reshape(self.n, *x.shape[2:])

  def map(self, f, *xs: jax.Array):
    """`f` over the chunks of `xs`, its results joined."""
    ys = jax.lax.map(lambda x: f(*x), tuple(map(self.split, xs)))
    return jax.tree.map(self.join, ys)
