"""FLOPs, memory traffic and collectives of one device, counted in a compiled program.

XLA's own analysis counts the body of a loop once; here it counts as often as it runs. FLOPs are
those of convolutions and matrix products, two a multiplication, without products with the zeros of
padding and dilation, as XLA counts them. Traffic is what each operation reads and writes of the
main memory: of a fusion only its arguments and results, of slices what they take; buffers that the
compiler keeps on the chip are left out, and the padding of layouts counts.
"""

import dataclasses
import functools
import math
import re

import numpy as np

from coda_jax.planning.hlo import Computation, Instruction, Module, Shape
from coda_jax.planning.loops import trip_count

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "ragged-all-to-all",
  "collective-permute",
  "collective-broadcast",
)
_FREE = {
  *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"),
  *("partition-id", "replica-id", "optimization-barrier", "domain", "add-dependency"),
}
_SLICES = ("slice", "dynamic-slice", "gather")
_VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert")


@dataclasses.dataclass
class Costs:
  """Of one device.

  Attributes:
    flops: of convolutions and matrix products.
    passes: the same, each times the bfloat16 products that its precision takes of the device (6 for
      two float32 operands at "highest", 3 at "high" or with one bfloat16 operand, otherwise 1).
    traffic: bytes read and written in main memory.
    payload: bytes that each kind of collective takes in, of an all-gather gives out.
    sent: bytes that a device sends for them on a ring.
    count: how often each runs.
    unknown_loops: loops of unknown length; they count once.
  """

  flops: float | int = 0
  passes: float | int = 0
  traffic: float | int = 0
  payload: dict[str, float | int] = dataclasses.field(default_factory=dict)
  sent: float | int = 0
  count: dict[str, int] = dataclasses.field(default_factory=dict)
  unknown_loops: int = 0

  def add(self, other: "Costs", times: int = 1) -> None:
    """Adds another part of the program that runs so often."""
    self.flops += times * other.flops
    self.passes += times * other.passes
    self.traffic += times * other.traffic
    self.sent += times * other.sent
    self.unknown_loops += other.unknown_loops
    for kind, n in other.payload.items():
      self.payload[kind] = self.payload.get(kind, 0) + times * n
      self.count[kind] = self.count.get(kind, 0) + times * other.count[kind]


def count(module: Module, devices: int) -> Costs:
  """The costs of a module that runs on `devices` devices."""
  return _Counter(module, devices).of(module.entry)


class _Counter:
  def __init__(self, module: Module, devices: int):
    self._module, self._devices = module, devices
    self.of = functools.cache(self._of)

  def _of(self, name: str) -> Costs:
    """Of one run of a computation."""
    computation, total, seen = self._module.computations[name], Costs(), set()
    for i in computation:
      self._add(total, computation, i, seen)
    return total

  def _add(self, total: Costs, where: Computation, i: Instruction, seen: set) -> None:
    op = i.op.removesuffix("-start")
    if i.op == "while":
      times = trip_count(self._module, where, i)
      total.unknown_loops += times is None
      for name in i.called("body", "condition"):
        total.add(self.of(name), 1 if times is None else times)
    elif i.op == "conditional":
      names = i.called("branch_computations", "true_computation", "false_computation")
      total.add(max((self.of(n) for n in names), key=lambda c: (c.passes, c.traffic)))
    elif i.op == "call" or op == "async":
      for name in i.called("to_apply", "calls"):
        total.add(self.of(name))
    elif i.op.endswith("-done") or i.op.endswith("-update") or i.op in _FREE:
      return
    elif op in COLLECTIVES:
      self._collective(total, where, i, op)
      total.traffic += self._boundary(where, i)
    elif i.op == "fusion":
      self._fused(total, i.called("calls")[0], seen)
      total.traffic += self._fusion_traffic(where, i)
    else:
      if i.op in ("dot", "convolution"):
        _products(total, where, i)
      total.traffic += self._boundary(where, i)

  def _fused(self, total: Costs, name: str, seen: set) -> None:
    """What is in a fusion but its traffic. An asynchronous collective is in several fusions."""
    computation = self._module.computations[name]
    for i in computation:
      if i.op in ("dot", "convolution"):
        _products(total, computation, i)
      elif i.op == "fusion":
        self._fused(total, i.called("calls")[0], seen)
      elif i.op in COLLECTIVES:
        channel = i.op, i.attribute(r"channel_id=(\d+)") or i.name
        if channel not in seen:
          scattered = i.op == "all-reduce" and "all-reduce-scatter" in name
          self._collective(total, computation, i, "reduce-scatter" if scattered else i.op)
        seen.add(channel)

  def _collective(self, total: Costs, where: Computation, i: Instruction, op: str) -> None:
    taken = sum(s.bytes for name in i.operands for s in where.instructions[name].results)
    n = _group(i.attributes, self._devices)
    payload = taken * n if op == "all-gather" else taken
    part = {"all-reduce": 2 * (n - 1) / n, "collective-permute": 1, "collective-broadcast": 1}
    sent = payload * part.get(op, (n - 1) / n)
    total.add(Costs(payload={op: payload}, count={op: 1}, sent=sent))

  # Traffic.

  def _boundary(self, where: Computation, i: Instruction) -> int:
    """Of an operation by itself."""
    if i.op == "custom-call" and "AllocateBuffer" in i.attributes:
      return 0
    results = [_main(s) for s in i.results]
    if i.op in _SLICES:  # reads as much as it gives, if what it cuts lies in main memory
      source = where.instructions[i.operands[0]]
      read = sum(s.padded for s in i.results) if any(map(_main, source.results)) else 0
      return sum(results) + read
    if i.op in ("dynamic-update-slice", "scatter"):
      update = i.operands[1 if i.op == "dynamic-update-slice" else -1]
      return 2 * sum(map(_main, where.instructions[update].results))
    if i.op == "copy-start":  # (target, source, context)
      return sum(results[:2])
    if i.op == "slice-start":  # ((source), target, context)
      return results[1] + (i.results[1].padded if results[0] else 0)
    if i.op == "broadcast":
      return sum(results)
    return sum(results) + sum(
      _main(s) for name in dict.fromkeys(i.operands) for s in where.instructions[name].results
    )

  def _fusion_traffic(self, where: Computation, i: Instruction) -> int:
    inner = self._module.computations[i.called("calls")[0]]
    total = sum(self._written(inner, inner.root, list(i.results)))
    for number, name in enumerate(i.operands):
      whole = sum(map(_main, where.instructions[name].results))
      if whole:
        total += min(whole, self._read(inner, inner.parameters[number].name))
    return total

  def _read(self, computation: Computation, name: str) -> int:
    """Bytes of an instruction's result that the computation reads."""
    whole = sum(s.padded for s in computation.instructions[name].results)
    total = 0
    for user in computation.users.get(name, ()):
      at = [n for n, o in enumerate(user.operands) if o == name]
      if user.op in _SLICES and at == [0]:
        total += sum(s.padded for s in user.results)
      elif user.op == "dynamic-update-slice" and at == [0]:
        pass  # it stays where it is
      elif user.op == "bitcast":
        total += self._read(computation, user.name)
      elif user.op == "fusion":
        inner = self._module.computations[user.called("calls")[0]]
        total += sum(self._read(inner, inner.parameters[n].name) for n in at)
      else:
        return whole
      if total >= whole:
        return whole
    return total

  def _written(self, computation: Computation, name: str, results: list[Shape]) -> list[int]:
    """Bytes of each array of a fusion's result that it writes."""
    i = computation.instructions[name]
    if i.op == "tuple" and len(i.operands) == len(results):
      parts = zip(i.operands, results, strict=True)
      return [sum(self._written(computation, o, [r])) for o, r in parts]
    if not any(map(_main, results)):
      return [0]
    while i.op in _VIEWS:
      i = computation.instructions[i.operands[0]]
    if i.op == "dynamic-update-slice":
      return [sum(s.padded for s in computation.instructions[i.operands[1]].results)]
    if i.op == "fusion":
      inner = self._module.computations[i.called("calls")[0]]
      return self._written(inner, inner.root, results)
    return [_main(s) for s in results]


def _main(shape: Shape) -> int:
  return 0 if shape.space else shape.padded


# {{0,1},{2,3}}, [2,2]<=[4], or axes of a mesh: mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}.
_GROUPS = re.compile(
  r"replica_groups=(\{\{[^}]*\}|\[[\d,]+\]<=|"
  r"mesh\[[^\]]*\](?:, device_ids=\(\[[\d,]*\](?:T\([\d,]*\))?\))? ?\{[^}]*\})"
)


def _group(attributes: str, devices: int) -> int:
  """Devices that a collective is over."""
  text = _GROUPS.search(attributes)
  if text is None:
    return devices
  if text[1].startswith("{{"):
    return text[1].count(",") + 1
  if text[1].startswith("["):
    return int(text[1].split("]")[0].split(",")[-1])
  sides = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", text[1])}
  used = text[1].rpartition("{")[2]
  parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", used)
  return math.prod(int(size) if size else sides[axis] for axis, size in parts) or devices


def _products(total: Costs, where: Computation, i: Instruction) -> None:
  operands = [where.instructions[name].results[0] for name in i.operands]
  flops = (_dot if i.op == "dot" else _convolution)(i, *operands)
  total.flops += flops
  total.passes += flops * _passes(i, operands)


def _passes(i: Instruction, operands: list[Shape]) -> int:
  precision = i.attribute(r"operand_precision=\{([\w,]+)\}") or ""
  wide = sum(s.kind in ("f32", "f64") for s in operands)
  if "highest" in precision:
    return (1, 3, 6)[wide]
  return (1, 2, 3)[wide] if "high" in precision else 1


def _dot(i: Instruction, lhs: Shape, rhs: Shape) -> int:
  del rhs
  dims = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
  contracted = math.prod(lhs.dims[int(d)] for d in dims.split(",") if d)
  return 2 * math.prod(i.results[0].dims) * contracted


def _convolution(i: Instruction, lhs: Shape, rhs: Shape) -> int:
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
  assert labels, i
  of_lhs, of_rhs, of_out = labels[1], labels[2], labels[3]
  window = i.attribute(r"window=\{([^}]*)\}") or ""
  option = lambda name: re.search(rf"\b{name}=([\w\-x]+)", window)
  split = lambda name, default: m[1].split("x") if (m := option(name)) else default
  spatial = sorted(d for d in of_out if d.isdigit())
  ones = ["1"] * len(spatial)
  strides, inside = split("stride", ones), split("lhs_dilate", ones)
  apart, pads = split("rhs_dilate", ones), split("pad", ["0_0"] * len(spatial))
  out = i.results[0].dims
  flops = 2 * out[of_out.index("b")] * out[of_out.index("f")] * rhs.dims[of_rhs.index("i")]
  for n, d in enumerate(spatial):
    a, b = lhs.dims[of_lhs.index(d)], rhs.dims[of_rhs.index(d)]
    low = int(pads[n].split("_")[0])
    args = a, b, out[of_out.index(d)], int(strides[n]), int(inside[n]), int(apart[n]), low
    flops *= _taps(*args)
  return flops


@functools.cache
def _taps(a: int, b: int, o: int, stride: int, inside: int, apart: int, low: int) -> int:
  """Products along one dimension whose factors are in the image."""
  at = np.arange(o)[:, None] * stride - low + np.arange(b) * apart
  return int(((at >= 0) & (at <= (a - 1) * inside) & (at % inside == 0)).sum())
