"""What the compiler is to compute again, what only once, and what late."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from coda_jax.ops.platform import platform


def recompute(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """`jax.checkpoint(function)`, of one argument, that saves memory on CPUs too.

  XLA's CPU compiler drops the barriers that keep the second computation apart from the first, and
  merges them again. There the second one takes the weights that `function` closes over after the
  cotangents; what it computes of the argument alone, before the first weight, is held. The
  function's last output is taken to be what it computes; others to be passed on to whoever uses
  them next.
  """
  if platform() != "cpu":
    return jax.checkpoint(function)

  def run(x):
    convert, consts = jax.closure_convert(function, x)

    @jax.custom_vjp
    def call(x, consts):
      return convert(x, *consts)

    def backward(kept, cotangent):
      x, consts = kept
      *passed, last = jax.tree.leaves(cotangent)
      cotangent = jax.tree.unflatten(jax.tree.structure(cotangent), [*passed, compute_once(last)])
      consts = after(cotangent, consts)
      return jax.vjp(lambda x, consts: convert(x, *consts), x, consts)[1](cotangent)

    call.defvjp(lambda x, consts: (convert(x, *consts), (x, consts)), backward)
    return call(x, consts)

  return run


def after(result: Any, x: Any) -> Any:
  """Arrays x, which XLA's CPU compiler is to use only when the arrays of `result` are there.

  It makes as early as it can what depends on nothing else, as features of a second image or the
  transposed kernels that convolutions take backward, and holds it. So a 0 is taken from x that the
  compiler does not know to be one.
  """
  if platform() != "cpu":
    return x
  zero = _zero(result)
  return jax.tree.map(lambda t: t - zero.astype(t.dtype), x)


def compute_once(x: jax.Array) -> jax.Array:
  """x, which XLA's CPU compiler is to hold as such.

  Sums and products that many operations take it would compute again in each of them, and hold what
  they are made of until the last: a division, here by 1, it does not repeat.
  """
  return _over_one(x, _zero(x)) if platform() == "cpu" else x


def _zero(x: Any) -> jax.Array:
  """0.0, which the compiler does not know before the arrays of x are there."""
  zero = sum(jnp.float32(t[(0,) * t.ndim] > jnp.inf) for t in jax.tree.leaves(x))
  return zero / (1 + zero)  # not computed again in each use, which would hold all of x


@jax.custom_jvp
def _over_one(x, zero):
  # Were the divisor the same along an axis, the compiler would multiply by its inverse instead.
  index = sum(jax.lax.broadcasted_iota(x.dtype, x.shape, axis) for axis in range(x.ndim))
  return x / (1 + zero.astype(x.dtype) * index)


_over_one.defjvp(lambda x, dx: (_over_one(*x), dx[0]))
