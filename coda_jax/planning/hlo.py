"""The text of a compiled program (HLO) as computations of instructions.

Source: https://openxla.org/xla/operation_semantics, and the text that `compiled.as_text()` gives.
Some compilers write `%x#2` for element 2 of a tuple; it is read as the `get-tuple-element` that it
stands for.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "s4": 4, "u4": 4, "c64": 64, "c128": 128}
_SHAPE = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Shape:
  """An array of a program.

  Attributes:
    kind: its element type, as "bf16".
    dims: sides.
    order: dimensions, the fastest first; of no length if the text does not tell.
    tile: the first tile of its layout, by which its last sides are padded.
    space: 0 is the device's main memory; others are memory on the chip or of the host.
  """

  kind: str
  dims: tuple[int, ...]
  order: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  space: int = 0

  @property
  def bits(self) -> int:
    """Of an element."""
    digits = re.search(r"\d+", self.kind)
    return _BITS.get(self.kind, int(digits[0]) if digits else 0)

  @property
  def bytes(self) -> int:
    """Without padding."""
    return math.prod(self.dims) * self.bits // 8

  @property
  def padded(self) -> int:
    """Bytes with the padding of the first tile."""
    sides = [self.dims[d] for d in self.order]
    for i, t in enumerate(reversed(self.tile[-len(sides) :] if sides else ())):
      sides[i] = -(-sides[i] // t) * t
    return math.prod(sides) * self.bits // 8 if self.order else self.bytes


def shapes(text: str) -> tuple[Shape, ...]:
  """The arrays of a type, of a tuple all of them."""
  return tuple(_shape(*m) for m in _SHAPE.findall(text))


@functools.lru_cache(maxsize=2**16)
def _shape(kind: str, dims: str, layout: str) -> Shape:
  order, _, rest = layout.partition(":")
  tile = re.search(r"T\(([\d,]+)\)", rest)
  space = re.search(r"S\((\d+)\)", rest)
  return Shape(
    kind,
    _numbers(dims.replace("<=", "")),
    _numbers(order),
    _numbers(tile[1]) if tile else (),
    int(space[1]) if space else 0,
  )


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(",") if n)


@dataclasses.dataclass
class Instruction:
  """One line of a computation.

  Attributes:
    name, op: as "fusion.3", "fusion".
    results: arrays of its type.
    operands: names; of a parameter or a constant the text in its brackets.
    attributes: the rest of the line.
  """

  name: str
  op: str
  results: tuple[Shape, ...]
  operands: list[str]
  attributes: str

  def attribute(self, pattern: str) -> str | None:
    """The first group of a regular expression in the attributes, or None."""
    match = re.search(pattern, self.attributes)
    return match[1] if match else None

  def called(self, *keys: str) -> list[str]:
    """Names of the computations that the attributes `keys` name."""
    names = []
    for key in keys:
      match = re.search(rf"\b{key}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes)
      if match:
        words = (match[1] if match[1] is not None else match[2]).split(",")
        names += [w.strip().lstrip("%") for w in words if w.strip()]
    return names


@dataclasses.dataclass
class Computation:
  """Instructions by name, in order; the last one marked ROOT is the result."""

  name: str
  instructions: dict[str, Instruction]
  root: str = ""

  def __iter__(self) -> Iterator[Instruction]:
    return iter(self.instructions.values())

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """By their number."""
    return {int(i.operands[0]): i for i in self if i.op == "parameter"}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """The instructions that take each instruction's result."""
    found: dict[str, list[Instruction]] = {}
    for i in self:
      for name in dict.fromkeys(i.operands):
        found.setdefault(name, []).append(i)
    return found


@dataclasses.dataclass
class Module:
  """Computations by name, and the one that runs."""

  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """The module of `compiled.as_text()`. Raises ValueError if there is no computation that runs."""
  computations: dict[str, Computation] = {}
  entry, current = "", None
  types: dict[str, str] = {}  # of the instructions of a computation
  for line in text.splitlines():
    if current is None:
      head = _HEAD.match(line)
      if head:
        current, types = Computation(head[2], {}), {}
        computations[head[2]] = current
        entry = head[2] if head[1] else entry
    elif line.startswith("}"):
      current = None
    else:
      found = _instruction(line)
      if found:
        root, kind, instruction = found
        types[instruction.name] = kind
        for name in instruction.operands:
          _name_element(name, current.instructions, types)
        current.instructions[instruction.name] = instruction
        if root:
          current.root = instruction.name
  if not entry:
    raise ValueError("the text holds no ENTRY computation")
  return Module(computations, entry)


_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


def _name_element(name: str, instructions: dict[str, Instruction], types: dict[str, str]) -> None:
  """Adds the instruction that `tuple#index` stands for."""
  tuple_name, _, index = name.rpartition("#")
  if not tuple_name or name in instructions or not index.isdecimal():
    return
  _name_element(tuple_name, instructions, types)
  if tuple_name in types:
    kind = types[name] = _split(types[tuple_name].strip()[1:-1])[int(index)]
    element = Instruction(name, "get-tuple-element", shapes(kind), [tuple_name], f", index={index}")
    instructions[name] = element


def _instruction(line: str) -> tuple[bool, str, Instruction] | None:
  """(whether it is the root, its type, it)."""
  match = _NAME.match(line)
  if not match:
    return None
  rest = _COMMENT.sub("", line[match.end() :])
  end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ") - 1
  kind, rest = rest[: end + 1], rest[end + 1 :].lstrip()
  start = rest.index("(")
  end = _closing(rest, start)
  inner = rest[start + 1 : end]
  op = rest[:start]
  if op in ("constant", "parameter", "iota"):
    operands = [inner]
  else:
    # A name alone, or behind its type.
    operands = [w.split()[-1].lstrip("%") for w in _split(inner)]
  instruction = Instruction(match[2], op, shapes(kind), operands, rest[end + 1 :])
  return bool(match[1]), kind, instruction


def _closing(text: str, start: int) -> int:
  """Where the bracket at `start` closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i
  raise ValueError(f"no closing bracket in {text[:80]!r}")


def _split(text: str) -> list[str]:
  """At commas outside of brackets."""
  words, depth, start = [], 0, 0
  for i, a in enumerate(text):
    depth += (a in "({[") - (a in ")}]")
    if a == "," and not depth:
      words.append(text[start:i])
      start = i + 1
  return [w for w in (*words, text[start:]) if w.strip()]
