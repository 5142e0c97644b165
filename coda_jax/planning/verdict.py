"""Does a program fit, what makes it fit, and how large its batch may be: all of it tried."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from coda_jax import sharding
from coda_jax.config import changed

MOST = 4096  # images a chip at which a search ends
Measure = Callable[[Any], dict]  # of settings; see `compiling.measure`
# Of one that is tried: the result of `compiling.measure` that a table shows.
_SHOWN = ("fits", "needs", "bound", "images_per_second")


def shards(settings, devices: list) -> int:
  """Parts that a batch is split into. Raises UserError if the mesh does not fit the devices."""
  mesh = sharding.make_mesh(settings.mesh, devices)
  return mesh.shape["data"] * mesh.shape["fsdp"]


def flag(changes: dict) -> str:
  """Changes as words of the command line."""
  words = (f"--config.{key.replace('__', '.')}={value}" for key, value in changes.items())
  return " ".join(words)


def remedies(what: str, settings, devices: list) -> Iterator[tuple[str, list[dict]]]:
  """(name, changes of which the first that fits counts) of what may make a program fit.

  - remat: the backward pass computes blocks again.
  - mesh: kernels and moments are split over 8 devices, or over as many as divide.
  - batch: micro-batches half as large, again and again; of other programs the batch.
  """
  if what == "update" and settings.remat in ("none", False):
    yield "remat", [{"remat": "blocks" if settings.remat == "none" else True}]
  width = math.gcd(len(devices), 8)
  if settings.mesh.fsdp == 1 and width > 1 and what != "sample":
    yield "mesh", [{"mesh__data": -1, "mesh__fsdp": width}]
  parts = len(devices) if what == "sample" else shards(settings, devices)
  if what == "update":
    size, n = settings.data.batch_size, settings.data.accumulation
    smaller = [n * 2**i for i in range(1, 16) if size % (n * 2**i * parts) == 0]
    changes: list[dict] = [{"data__accumulation": n} for n in smaller]
  else:
    size = settings.eval.batch_size
    smaller = [size >> i for i in range(1, 16) if size % (parts << i) == 0]
    changes = [{"eval__batch_size": n} for n in smaller]
  if changes:
    yield "batch", changes


def try_remedies(
  what: str, settings, devices: list, measure: Measure, tell: Callable[[str], None]
) -> list[dict]:
  """Each remedy by itself: {"remedy", "flags", "fits", "needs", ...}, of the last change tried."""
  rows = []
  for name, options in remedies(what, settings, devices):
    row = {}
    for changes in options:
      found = measure(changed(settings, **changes))
      tell(f"tried {flag(changes)}: {'fits' if found['fits'] else 'does not fit'}")
      row = {"remedy": name, "flags": flag(changes)} | {k: found.get(k) for k in _SHOWN}
      if found["fits"]:
        break
    rows.append(row)
  return rows


def with_batch(what: str, settings, devices: list, images: int):
  """The settings with so many images a device at a time."""
  if what == "update":
    size = images * shards(settings, devices) * settings.data.accumulation
    return changed(settings, data__batch_size=size)
  parts = len(devices) if what == "sample" else shards(settings, devices)
  return changed(settings, eval__batch_size=images * parts)


def images_of(what: str, settings, devices: list) -> int:
  """Images a device at a time in these settings, at least 1."""
  if what == "update":
    size = settings.data.batch_size // settings.data.accumulation
  else:
    size = settings.eval.batch_size
  return max(1, size // (len(devices) if what == "sample" else shards(settings, devices)))


def largest(fits: Callable[[int], bool], start: int, most: int = MOST) -> int:
  """The largest n up to `most` that fits, or 0: doubles or halves from `start`, then bisects.

  Args:
    fits: what fits is smaller than what does not.
  """
  n = min(start, most)
  if fits(n):
    good, bad = n, most + 1
    while good < most:
      n = min(2 * good, most)
      if not fits(n):
        bad = n
        break
      good = n
  else:
    good, bad = 0, n
    while bad > 1 and not good:
      n = bad // 2
      good, bad = (n, bad) if fits(n) else (0, n)
  while bad - good > 1:
    n = (good + bad) // 2
    good, bad = (n, bad) if fits(n) else (good, n)
  return good


def search(
  what: str, settings, devices: list, measure: Measure, tell: Callable[[str], None]
) -> tuple[int, list[dict]]:
  """(largest batch a device, what was tried): every size is compiled."""
  rows: dict[int, dict] = {}

  def fits(n: int) -> bool:
    found = measure(with_batch(what, settings, devices, n))
    rows[n] = {"images_per_device": n} | {k: found.get(k) for k in _SHOWN}
    tell(f"tried {n} images a device: {'fits' if found['fits'] else 'does not fit'}")
    return found["fits"]

  best = largest(fits, images_of(what, settings, devices))
  return best, [rows[n] for n in sorted(rows)]
