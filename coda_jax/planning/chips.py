"""TPU chips, and the names of their topologies.

Peaks are Google Cloud's (https://docs.cloud.google.com/tpu/docs/v5e and its neighbours). Limits are
what the compiler of libtpu 0.0.42 lets a program have.
"""

import dataclasses
import importlib.util
import math
import os
import re

from coda_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip.

  Attributes:
    dims: of a topology's shape.
    flops: peak FLOP/s in bfloat16.
    hbm: bytes of memory that a program may have.
    bandwidth: bytes/s of that memory.
    links: bytes/s that a chip sends over all of its links together. Half of the published
      bidirectional number; v4's is the published all-reduce bandwidth of a pod / 4096.
    halves: devices that JAX lists for a chip, each with its part of the above.
    cores: that Cloud's names `v4-N` count for a chip.
    options: of `get_topology_desc`.
  """

  dims: int
  flops: float
  hbm: float
  bandwidth: float
  links: float
  halves: int = 1
  cores: int = 1
  options: tuple[tuple[str, str], ...] = ()


_MEGACORE = (("chip_config_name", "megacore"),)  # otherwise v4 has two devices a chip
CHIPS = {
  "v4": Chip(3, 275e12, 30.75 * GIB, 1228e9, 270e9, cores=2, options=_MEGACORE),
  "v5e": Chip(2, 197e12, 15.75 * GIB, 819e9, 200e9),
  "v5p": Chip(3, 459e12, 95.74 * GIB, 2765e9, 600e9, cores=2),
  "v6e": Chip(2, 918e12, 31.25 * GIB, 1640e9, 400e9),
  "tpu7x": Chip(3, 2307e12, 2 * 94.75 * GIB, 7400e9, 600e9, halves=2),
}
_OTHER_NAMES = {"v5litepod": "v5e", "v5lite": "v5e", "v7x": "tpu7x"}
# The shapes that Cloud makes of so many chips.
_SHAPES = {
  2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
  3: ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
}
KNOWN = (
  "write NAME:SHAPE, as v5e:8x8, v6e:4x4, v4:2x2x4, v5p:2x4x4, tpu7x:2x2x1, or Cloud's name, as "
  "v5e-64, v5litepod-16, v6e-64, v4-32, v5p-64 (of the last two the number counts cores, two a "
  "chip)"
)


@dataclasses.dataclass(frozen=True)
class Topology:
  """A pod, or several.

  Attributes:
    name, shape: for example "v5e", (8, 8).
    slices: pods of that shape, which the data centre's network connects.
  """

  name: str
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> Chip:
    return CHIPS[self.name]

  @property
  def chips(self) -> int:
    return math.prod(self.shape) * self.slices

  def __str__(self) -> str:
    text = f"{self.name}:{'x'.join(map(str, self.shape))}"
    return text if self.slices == 1 else f"{self.slices} x {text}"


def parse(text: str, slices: int = 1) -> Topology:
  """The topology of a name. Raises UserError, with the known forms, for any other text."""
  match = re.fullmatch(r"(\w+)(?::(\d+(?:x\d+)+)|-(\d+))", text.strip().lower())
  name = match and _OTHER_NAMES.get(match[1], match[1])
  if not match or name not in CHIPS:
    raise UserError(f"topology {text!r} is unknown: {KNOWN}")
  chip, shape = CHIPS[name], match[2]
  if shape is None:
    # Of tpu7x Cloud has no such names.
    shapes = {_count(s) * chip.cores: s for s in _SHAPES[chip.dims]} if chip.halves == 1 else {}
    shape = shapes.get(int(match[3]))
    if shape is None:
      sizes = ", ".join(f"{name}-{n}" for n in shapes) or f"write {name}:AxBxC"
      raise UserError(f"topology {text!r} is no size of {name} ({sizes}); {KNOWN}")
  sides = tuple(map(int, shape.split("x")))
  if len(sides) != chip.dims or 0 in sides:
    raise UserError(f"topology {text!r}: {name}'s shapes have {chip.dims} sides; {KNOWN}")
  return Topology(name, sides, slices)


def _count(shape: str) -> int:
  return math.prod(map(int, shape.split("x")))


def has_libtpu() -> bool:
  """Whether programs can be compiled for TPUs; no TPU is needed for that."""
  return importlib.util.find_spec("libtpu") is not None


def devices(topology: Topology) -> list:
  """Devices of a topology that need not exist; programs can be compiled for them.

  Raises:
    UserError: libtpu is not installed, or knows no such topology.
  """
  if not has_libtpu():
    raise UserError("libtpu is not installed: pip install 'coda_jax[tpu]'; no TPU is needed")
  for name, value in (
    ("TPU_SKIP_MDS_QUERY", "1"),  # the metadata server of a cloud's machine
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # another process may compile too
    ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),  # of this host, which has none; libtpu asks for it
    ("TPU_WORKER_HOSTNAMES", "localhost"),
  ):
    os.environ.setdefault(name, value)
  from jax.experimental import topologies

  options: dict = dict(topology.chip.options)
  if math.prod(topology.shape) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if topology.slices > 1:
    options["num_slices"] = topology.slices
  shape = "x".join(map(str, topology.shape))
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{topology.name}:{shape}", **options
    )
  except RuntimeError as e:
    raise UserError(f"topology {topology}: libtpu refuses it ({e}); {KNOWN}") from e
  return list(found.devices)
