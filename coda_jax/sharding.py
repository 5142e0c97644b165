"""The mesh, and where arrays lie on it."""

import functools
import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from coda_jax.config import MeshSettings
from coda_jax.errors import UserError

AXES = ("data", "fsdp", "model")
BATCH_AXES = ("data", "fsdp")


def make_mesh(settings: MeshSettings, devices=None) -> Mesh:
  """Mesh with the axes data, fsdp, model over `devices` (all by default).

  Of several TPU slices, `data` alone runs over their slow network.

  Raises:
    UserError: the axes' product is not the number of devices, or data no multiple of the slices.
  """
  devices = jax.devices() if devices is None else devices
  shape = [settings.data, settings.fsdp, settings.model]
  if shape.count(-1) == 1 and 0 not in shape:
    shape[shape.index(-1)] = max(1, len(devices) // -math.prod(shape))
  if min(shape) < 1 or math.prod(shape) != len(devices):
    given = ", ".join(f"{a}={n}" for a, n in zip(AXES, shape, strict=True))
    raise UserError(f"config.mesh: {given} do not multiply to the {len(devices)} devices")
  slices = len({getattr(d, "slice_index", 0) for d in devices})
  if slices == 1:
    return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * 3, devices=devices)
  if shape[0] % slices:
    raise UserError(f"config.mesh: data={shape[0]} is not a multiple of the {slices} slices")
  inner, outer = (shape[0] // slices, *shape[1:]), (slices, 1, 1)
  placed = mesh_utils.create_hybrid_device_mesh(inner, outer, devices)
  return Mesh(placed, AXES, (AxisType.Auto,) * 3)


def spec_for(
  path: str, shape: tuple[int, ...], mesh: Mesh, rules: tuple[tuple[str, tuple[str, ...]], ...]
) -> PartitionSpec:
  """How the array `path` is split: by the first rule that matches and has its number of dimensions.

  An axis that does not divide its dimension is left out.
  """
  for pattern, spec in rules:
    if len(spec) == len(shape) and re.search(pattern, path):
      axes = zip(spec, shape, strict=True)
      return PartitionSpec(*(a if a and n % mesh.shape[a] == 0 else None for a, n in axes))
  return PartitionSpec()


def tree_shardings(tree, mesh: Mesh, rules):
  """A NamedSharding for every array of `tree`, by rules over its dotted path.

  Parameters, averages and moments lie in dictionaries by dotted path: the key alone counts, so
  that a rule which begins with ^ holds for all of them.
  """

  def sharding(path, x):
    name = jax.tree_util.keystr(path[-1:], simple=True, separator=".")
    return NamedSharding(mesh, spec_for(name, x.shape, mesh, rules))

  return jax.tree_util.tree_map_with_path(sharding, tree)


def replicated(mesh: Mesh) -> NamedSharding:
  """On every device in full."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading: int = 0) -> NamedSharding:
  """Images split over data x fsdp, behind `leading` dimensions that are not split."""
  return NamedSharding(mesh, PartitionSpec(*[None] * leading, BATCH_AXES))


def check_batch(name: str, size: int, mesh: Mesh) -> None:
  """Raises UserError if the batch axes do not divide `size`."""
  shards = mesh.shape["data"] * mesh.shape["fsdp"]
  if size % shards:
    raise UserError(f"{name} is {size} images; the mesh splits it over {shards} devices evenly")


@functools.cache  # every batch asks
def batch_parts(mesh: Mesh) -> list[list[int]]:
  """The processes that hold each part of a global batch, first part first.

  Processes whose devices differ along `model` alone hold the same images: they read one part.

  Raises:
    UserError: two processes have some of their images in common, but not all.
  """
  rows: dict[int, set[int]] = {}
  shards = math.prod(mesh.shape[a] for a in BATCH_AXES)
  for row, devices in enumerate(mesh.devices.reshape(shards, -1)):
    for device in devices:
      rows.setdefault(device.process_index, set()).add(row)
  parts: dict[tuple[int, ...], list[int]] = {}
  for process, held in sorted(rows.items()):
    parts.setdefault(tuple(sorted(held)), []).append(process)
  if shards != sum(map(len, parts)) or len(set(map(len, parts))) > 1:
    raise UserError(
      f"config.mesh: model={mesh.shape['model']} cuts the devices of a host; let it divide their"
      " number or be a multiple of it"
    )
  return [parts[held] for held in sorted(parts)]


def batch_part(mesh: Mesh) -> tuple[int, int]:
  """(which part of a global batch this process reads, number of parts)."""
  parts = batch_parts(mesh)
  mine = jax.process_index()
  return next(i for i, processes in enumerate(parts) if mine in processes), len(parts)


class GlobalBatches:
  """Iterator over the global batches of which every process reads its own part.

  Args:
    local: iterator over this process's part, trees of NumPy arrays [b, ...], with `close`.
    mesh: batches are split over its batch axes.
    accumulation: micro-batches of a batch; arrays become [accumulation, B / accumulation, ...].
    pick: the part of a local batch that goes to the devices; all of it by default.
  """

  def __init__(self, local, mesh: Mesh, accumulation: int = 1, pick=lambda batch: batch):
    self._local, self._accumulation, self._pick = local, accumulation, pick
    self._sharding = batch_sharding(mesh, leading=1)

  def __iter__(self):
    return self

  def __next__(self):
    def place(x):
      x = x.reshape(self._accumulation, -1, *x.shape[1:])
      return to_global(x, self._sharding, axis=1)

    return jax.tree.map(place, self._pick(next(self._local)))

  def close(self) -> None:
    """Stops the threads and workers that read."""
    self._local.close()


def gather(tree, mesh: Mesh):
  """The arrays of `tree` in full on every device; a collective."""
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))(tree)


def to_global(local: np.ndarray, sharding: NamedSharding, axis: int = 0) -> jax.Array:
  """The global array of which every process gives its part along `axis`; see `batch_part`."""
  shape = list(local.shape)
  assert isinstance(sharding.mesh, Mesh)
  shape[axis] *= batch_part(sharding.mesh)[1]
  return jax.make_array_from_process_local_data(sharding, local, tuple(shape))


def over_local_devices(x):
  """`x` split over this process's devices along its first axis, if they divide it."""
  devices = jax.local_devices()
  if len(devices) == 1 or len(x) % len(devices):
    return x
  mesh = Mesh(np.asarray(devices), ("data",))
  return jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
