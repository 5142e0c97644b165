"""How often the loops of a compiled program run."""

import re

from coda_jax.planning.hlo import Computation, Instruction, Module

_COPIES = ("copy", "bitcast", "convert", "copy-start", "copy-done", "optimization-barrier")


def trip_count(module: Module, where: Computation, loop: Instruction) -> int | None:
  """Runs of a `while`'s body, or None if its text does not tell.

  The compiler's own note counts where it is there. Otherwise the condition compares an element of
  the loop's state with a constant; the element starts as a constant and grows by one.

  Args:
    where: the computation that holds `loop`.
  """
  known = re.search(r'known_trip_count\D*?"?n"?\D+?(\d+)', loop.attributes)
  if known:
    return int(known[1])
  (name,) = loop.called("condition")
  condition = module.computations[name]
  found = _comparison(module, condition)
  if found is None:
    return None
  direction, left, right = found
  # The element that the body changes starts with its first value: the other is the bound.
  start, bound = (_value(module, where, condition, loop, side) for side in (left, right))
  if start is None or bound is None:
    return None
  if direction == "GT":
    start, bound, direction = bound, start, "LT"
  if direction == "NE" or direction == "LT":
    return max(0, bound - start)
  return max(0, bound - start + 1) if direction == "LE" else None


def _comparison(module: Module, condition: Computation) -> tuple[str, str, str] | None:
  """(direction, left, right) of what a condition compares, as names in it."""
  root = condition.instructions[condition.root]
  while root.op in _COPIES:
    root = condition.instructions[root.operands[0]]
  if root.op == "compare":
    return root.attribute(r"direction=(\w+)") or "", root.operands[0], root.operands[1]
  if root.op == "fusion":
    inner = module.computations[root.called("calls")[0]]
    found = _comparison(module, inner)
    if found is None:
      return None
    names = []
    for name in found[1:]:
      i = inner.instructions[name]
      while i.op in _COPIES:
        i = inner.instructions[i.operands[0]]
      if i.op != "parameter":  # a constant within
        return None if i.op != "constant" else _with_constant(condition, root, found, inner)
      names.append(root.operands[int(i.operands[0])])
    return found[0], names[0], names[1]
  return None


def _with_constant(condition, root, found, inner) -> tuple[str, str, str]:
  """The comparison in a fusion, its constants put into the condition under their names."""
  names = []
  for name in found[1:]:
    i = inner.instructions[name]
    if i.op == "constant":
      condition.instructions.setdefault(i.name, i)
      names.append(i.name)
    else:
      names.append(root.operands[int(i.operands[0])])
  return found[0], names[0], names[1]


def _value(
  module: Module, where: Computation, condition: Computation, loop: Instruction, name: str
) -> int | None:
  """What `name` of a condition is before the first run, if that is a constant."""
  i = condition.instructions[name]
  while i.op in _COPIES:
    i = condition.instructions[i.operands[0]]
  if i.op == "constant":
    return _integer(i)
  if i.op != "get-tuple-element":
    return None
  index = int(i.attribute(r"index=(\d+)") or 0)
  return _constant(module, where, loop.operands[0], index)


def _constant(module: Module, where: Computation, name: str, index: int) -> int | None:
  """Element `index` of the tuple `name`, if it is a constant."""
  state = where.instructions.get(name)
  if state is None or state.op != "tuple":
    return None
  i = where.instructions[state.operands[index]]
  while i.op in _COPIES:
    i = where.instructions[i.operands[0]]
  return _integer(i) if i.op == "constant" else None


def _integer(constant: Instruction) -> int | None:
  text = constant.operands[0].strip()
  return int(text) if re.fullmatch(r"-?\d+", text) else None
