"""NNX modules and the flat dictionaries of their arrays, by dotted path.

Everything outside of a module (safetensors, checkpoints, regexes of the config, shardings) knows an
array as `vae.encoder.conv_in.kernel`. Jitted functions take such dictionaries and `merge` them into
a module; its structure, the graphdef, is a constant of the function.
"""

import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

Arrays = dict[str, Any]  # of jax or NumPy arrays, or of their shapes or shardings
Tree = Any  # of the same, or of what orbax puts in their places


def flatten(state: nnx.State) -> Arrays:
  """The arrays of an NNX state by dotted path, sorted."""
  flat = nnx.to_flat_state(state)
  return dict(sorted((".".join(map(str, path)), v.get_value()) for path, v in flat))


def unflatten(arrays: Mapping[str, Any]) -> dict:
  """The nested dictionary that `nnx.merge` and `nnx.update` take; inverse of `flatten`."""
  nested: dict = {}
  for name, array in arrays.items():
    *parents, last = (int(p) if p.isdecimal() else p for p in name.split("."))
    node = nested
    for part in parents:
      node = node.setdefault(part, {})
    node[last] = array
  return nested


def of(module: nnx.Module, filter: Any = ...) -> Arrays:
  """The arrays of `module` that an NNX filter selects (all by default) by dotted path, sorted."""
  return flatten(nnx.state(module, filter))


def split(module: nnx.Module, *filters: Any) -> tuple[Any, ...]:
  """(graphdef, arrays of the first filter, of the second, ...), as `nnx.split`; traceable.

  Every array goes to the first filter that selects it, and one must; no filter means all.
  """
  graphdef, *states = nnx.split(module, *filters)
  return graphdef, *map(flatten, states)


def merge(graphdef: nnx.GraphDef, *arrays: Mapping[str, Any]) -> Any:
  """The module of this structure with `arrays`, which together hold every path; traceable.

  Of arrays with the same path the last counts.
  """
  return nnx.merge(graphdef, unflatten({k: x for part in arrays for k, x in part.items()}))


def matching(rules: tuple[tuple[str, str], ...]) -> Callable[[tuple, Any], bool]:
  """An NNX filter of (variable type, regex over the dotted path) pairs; one must match.

  A type matches the types that derive from it too: `nnx.LoRAParam` is a `Param`.
  """

  def selects(path: tuple, variable: Any) -> bool:
    name, kinds = ".".join(map(str, path)), {c.__name__ for c in type(variable).__mro__}
    return any(kind in kinds and re.search(regex, name) for kind, regex in rules)

  return selects


def jit_module(function: Callable) -> Callable[[nnx.Module], Callable]:
  """`jit_module(function)(module)` is `function(module, *arrays)`, compiled, of the arrays.

  It is compiled once for each structure of a module and shapes of the arrays. The module's
  parameters are arguments of the compiled function, taken when the module is bound.
  """

  @functools.partial(jax.jit, static_argnums=0)
  def compiled(graphdef, arrays, *args):
    return function(merge(graphdef, arrays), *args)

  return lambda module: functools.partial(compiled, *split(module))


def padded_size(batch: int) -> int:
  """The batch that is compiled for: a power of two up to 8, then a multiple of 8.

  So a loop over a data set compiles twice at most, the second time for what is left at its end.
  """
  return 1 << (batch - 1).bit_length() if batch <= 8 else -(-batch // 8) * 8


def not_finite(arrays: Mapping[str, Any]) -> list[str]:
  """Names of the arrays that hold NaN or infinity as float32; one is cast at a time."""
  with np.errstate(over="ignore", invalid="ignore"):
    return [k for k, x in arrays.items() if not np.isfinite(np.asarray(x, np.float32)).all()]
