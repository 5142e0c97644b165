"""What devices exchange, read from a compiled program."""

import math
import re
from typing import NamedTuple

_KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_LINE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")


class Collective(NamedTuple):
  """One collective: its kind, the elements of its largest result, and whether a loop repeats it."""

  kind: str
  elements: int
  shapes: str
  in_loop: bool


def collectives(text: str) -> list[Collective]:
  """The collectives of a module's text (`compiled.as_text()`)."""
  bodies = set(re.findall(r"body=%?([\w.-]+)", text))
  called, name, found = {}, "", []
  for line in text.splitlines():
    if header := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
      name = header[1]
    for other in re.findall(
      r"(?:to_apply|calls|body|condition|branch_computations)=\{?%?([\w.-]+)", line
    ):
      called.setdefault(name, set()).add(other)
    if match := _LINE.search(line):
      shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
      sizes = [math.prod(int(n) for n in s.split(",") if n) for s in shapes]
      found.append((name, match[2], max(sizes), match[1]))
  in_loops, todo = set(), list(bodies)
  while todo:
    body = todo.pop()
    if body not in in_loops:
      in_loops.add(body)
      todo += called.get(body, ())
  return [Collective(kind, n, shapes, where in in_loops) for where, kind, n, shapes in found]
