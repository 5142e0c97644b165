"""Functions of tokens and codes, each device on its own tokens and its own codes.

Tokens lie over the mesh's batch axes and codes over `model`. A function sees the part of one
device, loops over that part alone, and says with a `Layout` what is summed over other devices.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

_CODES = "model"


class Layout:
  """Where n tokens and V codes lie on the mesh of an array; all on one device without a mesh.

  Under `jit` the mesh is the one set with `jax.set_mesh`, or that of the arguments. An axis that
  does not divide tokens or codes is not used for them.

  Args:
    tokens: [n, ...].
    codes: V.

  Attributes:
    tokens, codes: mesh axes of an axis of tokens and of one of codes, for `PartitionSpec`.
    token_shards, code_shards: devices over which tokens and codes are split.
  """

  def __init__(self, tokens: jax.Array, codes: int):
    self._mesh = jax.typeof(tokens).sharding.mesh
    sizes = {name: n for name, n in self._mesh.shape.items() if n > 1}
    self.codes = _CODES if _CODES in sizes and codes % sizes[_CODES] == 0 else None
    axes = tuple(name for name in sizes if name != _CODES)
    shards = math.prod(sizes[name] for name in axes)
    self.tokens = axes if axes and len(tokens) % shards == 0 else None
    self.token_shards = shards if self.tokens else 1
    self.code_shards = sizes[_CODES] if self.codes else 1
    self._local = not sizes

  def run(self, function: Callable, args: Sequence, in_specs: Sequence, out_specs: Any):
    """`function(*args)` of each device's parts; specs are trees of `PartitionSpec`."""
    if self._local:
      return function(*args)
    mapped = jax.shard_map(
      function, mesh=self._mesh, in_specs=tuple(in_specs), out_specs=out_specs, check_vma=False
    )
    return mapped(*args)

  def sum_tokens(self, x):
    """The sum over the devices that have other tokens."""
    return jax.lax.psum(x, self.tokens) if self.tokens else x

  def sum_codes(self, x):
    """The sum over the devices that have other codes."""
    return jax.lax.psum(x, self.codes) if self.codes else x

  def max_codes(self, x):
    """The maximum over the devices that have other codes."""
    return jax.lax.pmax(x, self.codes) if self.codes else x

  def first_code(self, codes: int) -> jax.Array | int:
    """The number of this device's first code, of which it has `codes`."""
    return jax.lax.axis_index(self.codes) * codes if self.codes else 0

  def largest(self, values: jax.Array, ids: jax.Array, codes: int) -> tuple[jax.Array, jax.Array]:
    """Of each token the largest value over all codes, and the first code that has it.

    Args:
      values, ids: [n] the same of this device's codes.
      codes: how many it has.
    """
    if not self.codes:
      return values, ids
    largest = self.max_codes(values)
    mine = jnp.where(values == largest, ids + self.first_code(codes), jnp.iinfo(jnp.int32).max)
    return largest, jax.lax.pmin(mine, self.codes)
