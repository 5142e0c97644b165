"""FLOPs of a function, counted in its jaxpr: of convolutions and matrix products alone.

A multiplication counts two. Products with the zeros of padding and of dilation do not count,
neither does what no output uses. A scan counts its length, a loop of unknown length once, a branch
the dearest way.
"""

import math

import jax
import jax.extend
import numpy as np


def _conv_flops(eqn) -> int:
  """Of `conv_general_dilated`, without the products with zeros of padding and dilation."""
  (lhs, rhs), out = (v.aval.shape for v in eqn.invars), eqn.outvars[0].aval.shape
  p = eqn.params
  numbers = p["dimension_numbers"]
  dims = zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
  flops = 2 * out[numbers.out_spec[0]] * out[numbers.out_spec[1]] * rhs[numbers.rhs_spec[1]]
  for i, (a, b, o) in enumerate(dims):
    at = np.arange(out[o])[:, None] * p["window_strides"][i] - p["padding"][i][0]
    at = at + np.arange(rhs[b]) * p["rhs_dilation"][i]
    dilation = p["lhs_dilation"][i]
    flops *= int(((at >= 0) & (at <= (lhs[a] - 1) * dilation) & (at % dilation == 0)).sum())
  return flops


def _dot_flops(eqn) -> int:
  (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
  a, b = (v.aval.shape for v in eqn.invars)
  free = [n for i, n in enumerate(b) if i not in (*contracted, *batch)]
  return 2 * math.prod(a) * math.prod(free)


_COSTS = {"conv_general_dilated": _conv_flops, "dot_general": _dot_flops}


def _open(jaxpr):
  return getattr(jaxpr, "jaxpr", jaxpr)


def _inner(eqn):
  """The jaxpr of an equation that only calls it with all of its operands, or None."""
  for value in eqn.params.values():
    inner = _open(value)
    if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
      return inner
  return None


def _is_var(x) -> bool:
  return not isinstance(x, jax.extend.core.Literal)


def _spent(jaxpr, used: list[bool]) -> tuple[int, list[bool]]:
  """(FLOPs that the used outputs take, which inputs they take)."""
  live = {v for v, u in zip(jaxpr.outvars, used, strict=True) if u and _is_var(v)}
  total = 0
  for eqn in reversed(jaxpr.eqns):
    wanted = [v in live for v in eqn.outvars]
    if not any(wanted) and not eqn.effects:
      continue
    name, needed = eqn.primitive.name, [True] * len(eqn.invars)
    if name in _COSTS:
      total += _COSTS[name](eqn)
    elif name == "cond":
      branches = [_spent(_open(b), wanted) for b in eqn.params["branches"]]
      total += max(flops for flops, _ in branches)
      needed = [True] + [any(n) for n in zip(*(n for _, n in branches), strict=True)]
    elif name in ("scan", "while"):
      inner = _open(eqn.params["jaxpr" if name == "scan" else "body_jaxpr"])
      total += eqn.params.get("length", 1) * _spent(inner, [True] * len(inner.outvars))[0]
    elif (inner := _inner(eqn)) is not None:
      flops, needed = _spent(inner, wanted)
      total += flops
    live |= {v for v, n in zip(eqn.invars, needed, strict=True) if n and _is_var(v)}
  return total, [v in live for v in jaxpr.invars]


def flops(function, *args) -> int:
  """FLOPs of convolutions and matrix products that `function(*args)` takes."""
  jaxpr = jax.make_jaxpr(function)(*args).jaxpr
  return _spent(jaxpr, [True] * len(jaxpr.outvars))[0]


def _least(jaxpr, depends: list[bool]) -> tuple[int, int, list[bool]]:
  """(forward, backward FLOPs, which outputs depend on the inputs of the gradient)."""
  reached = {v for v, d in zip(jaxpr.invars, depends, strict=True) if d}
  forward = backward = 0
  for eqn in jaxpr.eqns:
    name = eqn.primitive.name
    ins = [_is_var(v) and v in reached for v in eqn.invars]
    outs = [any(ins)] * len(eqn.outvars)
    if name in _COSTS:
      cost = _COSTS[name](eqn)
      forward, backward = forward + cost, backward + sum(ins) * cost
    elif name == "stop_gradient":
      outs = [False] * len(outs)
    elif name == "custom_vjp_call" or name in ("scan", "while", "cond"):
      pass  # only look-ups are such; they have a formula
    elif (inner := _inner(eqn)) is not None:
      f, b, outs = _least(inner, ins)
      forward, backward = forward + f, backward + b
    reached |= {v for v, d in zip(eqn.outvars, outs, strict=True) if d}
  return forward, backward, [_is_var(v) and v in reached for v in jaxpr.outvars]


def least(function, wrt, *args) -> np.ndarray:
  """Least FLOPs [forward, backward] of `function(wrt, *args)` and its gradient for `wrt`.

  Look-ups, loops and branches in it are not counted.
  """
  jaxpr = jax.make_jaxpr(function)(wrt, *args).jaxpr
  n = len(jax.tree.leaves(wrt))
  return np.array(_least(jaxpr, [i < n for i in range(len(jaxpr.invars))])[:2])
