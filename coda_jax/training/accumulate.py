"""Sums over the micro-batches of an update."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def over_micro_batches(
  function: Callable[[Any, jax.Array | int, Any], tuple[Any, Any, Any]], carry: Any, batches: Any
) -> tuple[Any, Any, Any]:
  """Runs micro-batches one after the other; traceable.

  Args:
    function: (carry, number of the micro-batch, micro-batch) -> (carry, means, sums), trees of
      arrays.
    carry: before the first micro-batch.
    batches: a tree of arrays [n, ...], one row for each micro-batch.

  Returns:
    (carry after the last one, mean of the means, sum of the sums).
  """
  n = len(jax.tree.leaves(batches)[0])

  def micro_batch(carry, i, batch):
    carry, means, sums = function(carry, i, batch)
    return carry, (jax.tree.map(lambda x: x / n, means), sums)

  def add(carry_and_total, i_and_batch):
    carry, total = carry_and_total
    carry, found = micro_batch(carry, *i_and_batch)
    return (carry, jax.tree.map(jnp.add, total, found)), None

  first = jax.tree.map(lambda x: x[0], batches)
  if n == 1:  # without a loop the compiler sees through the update
    carry, total = micro_batch(carry, 0, first)
  else:
    _, shapes = jax.eval_shape(micro_batch, carry, 0, first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    (carry, total), _ = jax.lax.scan(add, (carry, zeros), (jnp.arange(n), batches))
  return carry, *total
