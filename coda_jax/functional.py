"""Modules as pure functions of flat dictionaries of arrays."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx

Arrays = dict[str, jax.Array | jax.ShapeDtypeStruct]


class Functional:
  """The structure of a module whose arrays are kept elsewhere, by dotted path."""

  def __init__(self, graphdef: nnx.GraphDef, variables: dict[str, tuple[tuple, nnx.Variable]]):
    self._graphdef, self._variables = graphdef, variables

  @property
  def names(self) -> list[str]:
    """Paths of all arrays, sorted."""
    return list(self._variables)

  def module(self, *arrays: Mapping[str, Any]) -> nnx.Module:
    """The module with `arrays`, which together hold every path (later ones win); traceable.

    None may stand for arrays that are not used.
    """
    merged = {k: v for part in arrays for k, v in part.items()}
    flat = [(path, v.replace(merged[name])) for name, (path, v) in self._variables.items()]
    return nnx.merge(self._graphdef, nnx.from_flat_state(flat))

  def select(self, rules: tuple[tuple[str, str], ...]) -> set[str]:
    """Paths that one of the (variable type, regex over the path) pairs matches.

    A type matches the types that derive from it too: `nnx.LoRAParam` is a `Param`.
    """
    kinds = {n: {c.__name__ for c in type(v).__mro__} for n, (_, v) in self._variables.items()}
    return {
      name for name, of in kinds.items() if any(k in of and re.search(p, name) for k, p in rules)
    }


def arrays_of(module: nnx.Module) -> Arrays:
  """The arrays of `module` by dotted path, sorted."""
  flat = nnx.to_flat_state(nnx.state(module))
  return dict(sorted((".".join(map(str, path)), v.get_value()) for path, v in flat))


def take_apart(module: nnx.Module) -> tuple[Functional, Arrays]:
  """The structure of `module` and its arrays by dotted path."""
  graphdef, state = nnx.split(module)
  named = {".".join(map(str, path)): (path, v) for path, v in nnx.to_flat_state(state)}
  structure = {name: (path, v.replace(None)) for name, (path, v) in sorted(named.items())}
  return Functional(graphdef, structure), arrays_of(module)


def structure_of(make: Callable[[], nnx.Module]) -> Functional:
  """The structure of the module that `make` would build; nothing is allocated."""
  return take_apart(nnx.eval_shape(make))[0]


def part(arrays: Arrays, names: set[str]) -> tuple[Arrays, Arrays]:
  """(the arrays of `names`, the others)."""
  return (
    {k: x for k, x in arrays.items() if k in names},
    {k: x for k, x in arrays.items() if k not in names},
  )
