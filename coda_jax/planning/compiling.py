"""Compiles a program for a pod and measures what came out, as plain numbers for JSON."""

import dataclasses
import hashlib
import importlib.metadata
import json
import math
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax

from coda_jax import outputs
from coda_jax.errors import UserError, one_line
from coda_jax.planning import costs, hlo
from coda_jax.planning.chips import GIB, Topology
from coda_jax.planning.early import CompilerError
from coda_jax.planning.programs import Program

Optimize = Callable[[], tuple[str, int]]
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)([KMGT]?)i?B?"


class Store:
  """Results by program, kept in the JSON file of `--json`: what was compiled is not again.

  Args:
    path: the file; None keeps nothing beyond this object.

  Raises:
    UserError: the file holds something else.
    OSError: it cannot be written.
  """

  def __init__(self, path: pathlib.Path | None):
    self._path, self._compiled, self._result = path, {}, None
    if path is not None and not path.exists():
      self._write()  # now, not after minutes, if it cannot be
    elif path is not None:
      try:
        self._compiled = json.loads(path.read_text())["compiled"]
      except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"--json={path} holds no results of this command; name another file") from e

  def get(self, key: str) -> dict | None:
    return self._compiled.get(key)

  def put(self, key: str, found: dict) -> None:
    self._compiled[key] = found
    self._write()

  def finish(self, result: dict) -> None:
    """Keeps the answer of the command beside what it compiled."""
    self._result = result
    self._write()

  def _write(self) -> None:
    if self._path is not None:
      value = {"result": self._result, "compiled": self._compiled}
      self._path.parent.mkdir(parents=True, exist_ok=True)
      outputs.write_text(self._path, json.dumps(value, indent=1) + "\n")


def versions() -> dict[str, str]:
  """Of what decides a compiled program."""
  found = {}
  for name in ("jax", "jaxlib", "libtpu"):
    try:
      found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
      continue
  return found


def measure(
  program: Program, topology: Topology, store: Store, optimize: Optimize | None = None
) -> dict[str, Any]:
  """What a program needs of each chip; from `store` if the same program was compiled before.

  Args:
    optimize: gives the program's optimized text and its bytes, as `early.optimize` does; without
      it the program is compiled to the end.

  Returns:
    "fits"; "images" of a call and "images_per_chip"; "groups", bytes of its arrays by kind;
    "limit", bytes that a program may have; and, of one chip:
    - "needs": bytes, None if the compiler does not say what it wanted;
    - where it fits: "memory" (bytes by kind), "costs" (see `costs.Costs`), "xla" (FLOPs and bytes
      of XLA's own analysis; None with `optimize`), "seconds" (least for products, memory and
      collectives), "bound", "images_per_second" of all chips together at the largest of them;
    - else "error".

  Raises:
    JaxRuntimeError, CompilerError: the compiler fails for another reason than memory.
  """
  lowered = program.lower()
  text = f"{topology} {versions()} {lowered.as_text()}" + (" without code" if optimize else "")
  key = hashlib.sha256(text.encode()).hexdigest()[:24]
  chip = topology.chip
  found = {
    "topology": str(topology),
    "chips": topology.chips,
    "images": program.images,
    "images_per_chip": program.images / topology.chips,
    "steps": program.steps,
    "limit": chip.hbm,
    "groups": {k: chip.halves * _local_bytes(tree) for k, tree in program.groups.items()},
    "versions": versions(),
  }
  compiled = store.get(key)
  if compiled is None:
    compiled = _compile(lowered, topology) if optimize is None else _read(optimize, topology)
    store.put(key, compiled)
  found |= compiled
  if compiled["fits"]:
    found |= roofline(compiled["costs"], topology, program.images)
  return found


def _compile(lowered: jax.stages.Lowered, topology: Topology) -> dict[str, Any]:
  start, n = time.monotonic(), topology.chip.halves
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as e:
    return _too_large(e, topology) | {"compile_seconds": time.monotonic() - start}
  m: Any = compiled.memory_analysis()
  memory = {
    "arguments": m.argument_size_in_bytes,
    "fresh results": m.output_size_in_bytes - m.alias_size_in_bytes,
    "temporaries": m.temp_size_in_bytes,
    "program": m.generated_code_size_in_bytes,
  }
  xla: Any = compiled.cost_analysis()
  xla = {k: n * xla.get(k, 0) for k in ("flops", "bytes accessed")}
  found = _account(compiled.as_text() or "", memory, topology)
  return found | {"xla": xla, "compile_seconds": time.monotonic() - start}


def _read(optimize: Optimize, topology: Topology) -> dict[str, Any]:
  start = time.monotonic()
  try:
    text, size = optimize()
  except CompilerError as e:
    return _too_large(e, topology) | {"compile_seconds": time.monotonic() - start}
  found = _account(text, {"all arrays": size}, topology)
  return found | {"xla": None, "compile_seconds": time.monotonic() - start}


def _account(text: str, memory: dict[str, int], topology: Topology) -> dict[str, Any]:
  """Of a chip, by the program's text and the memory of a device."""
  n = topology.chip.halves
  memory = {k: n * v for k, v in memory.items()}
  counted = costs.count(hlo.parse(text), topology.chips * n)
  return {
    "fits": sum(memory.values()) <= topology.chip.hbm,
    "needs": sum(memory.values()),
    "memory": memory,
    "costs": dataclasses.asdict(_times(counted, n)),
  }


def _too_large(e: Exception, topology: Topology) -> dict[str, Any]:
  """Of a program that the compiler refused; raises `e` if the reason is not memory."""
  needs = needed(str(e))
  if needs is None and "RESOURCE_EXHAUSTED" not in str(e):
    raise e
  needs = None if needs is None else topology.chip.halves * needs
  return {"fits": False, "needs": needs, "error": one_line(e)[:500]}


def _times(counted: costs.Costs, n: int) -> costs.Costs:
  """Of a chip with so many devices. Loops and how often collectives run do not add up."""
  total = costs.Costs()
  total.add(counted, n)
  return dataclasses.replace(total, count=counted.count)


def needed(error: str) -> float | None:
  """Bytes of a device that a program wants by the compiler's message, or None."""
  for pattern in (
    rf"Used {_SIZE} of {_SIZE} hbm",
    rf"HLO temporaries \({_SIZE}\) exceeds available HBM",
    rf"{_SIZE} exceeds available HBM",
  ):
    match = re.search(pattern, error)
    if match:
      return float(match[1]) * _UNITS[match[2]]
  return None


def _local_bytes(tree: Any) -> int:
  """Of a tree of shapes with shardings, on each device, without padding."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
  )


def roofline(counted: dict, topology: Topology, images: int) -> dict[str, Any]:
  """Least times of a call by a chip's peaks, and what the largest of them allows.

  Args:
    counted: `costs.Costs` of a chip, as a dictionary.
    images: of a call, over all chips.
  """
  chip = topology.chip
  seconds = {
    "products": counted["passes"] / chip.flops,
    "memory": counted["traffic"] / chip.bandwidth,
    "collectives": counted["sent"] / chip.links,
  }
  bound = max(seconds, key=lambda k: seconds[k])
  rate = images / seconds[bound] if seconds[bound] else None
  return {"seconds": seconds, "bound": bound, "images_per_second": rate}


def gib(n: float | int | None) -> str:
  return "?" if n is None else f"{n / GIB:.3f} GiB"
