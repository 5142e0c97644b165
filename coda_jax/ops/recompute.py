"""What the compiler is to compute again, and what only once."""

from collections.abc import Callable
from typing import Any

import jax

from coda_jax.ops.platform import platform


def recompute(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
  """`jax.checkpoint(function)`, of one argument, that saves memory on CPUs too.

  XLA's CPU compiler drops the barriers that keep the second computation apart from the first, and
  merges them again. There the second one starts from the argument plus 0 times an element of the
  cotangent, which no compiler may simplify: it could be NaN. So do the weights: convolutions take
  transposed copies of them backward, which the scheduler would else make at the start and hold.
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
      late = jax.tree.leaves(cotangent)[0]
      late = 0 * late[(0,) * late.ndim]

      def delay(t):
        return t + late.astype(t.dtype)

      x, consts = jax.tree.map(delay, x), [delay(t) if t.ndim > 1 else t for t in consts]
      return jax.vjp(lambda x, consts: convert(x, *consts), x, consts)[1](cotangent)

    call.defvjp(lambda x, consts: (convert(x, *consts), (x, consts)), backward)
    return call(x, consts)

  return run


def compute_once(x: jax.Array) -> jax.Array:
  """x, which XLA's CPU compiler is to hold as such.

  A sum that many operations take it would add again in each of them, and hold both summands until
  the last: a division it does not repeat. (x that is not finite becomes NaN.)
  """
  return _over_one(x) if platform() == "cpu" else x


@jax.custom_jvp
def _over_one(x):
  return x / (1 + 0 * x)


_over_one.defjvp(lambda x, dx: (_over_one(*x), *dx))
