"""One evaluation for trainers and commands: images in, metrics out, over devices and processes."""

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

from coda_jax import sharding
from coda_jax.errors import UserError
from coda_jax.evaluation.metrics import METRICS, Metric, Results
from coda_jax.evaluation.reconstruction import Batch, BatchResult

T = TypeVar("T")  # a pytree of arrays [B, ...]
Images = Mapping[str, np.ndarray]  # a batch: "image", "valid" and perhaps more, all [b, ...]


def evaluate(
  function: Callable[[Any], BatchResult],
  batches: Iterable[Images],
  *,
  mesh: jax.sharding.Mesh | None = None,
  metrics: Sequence[type[Metric]] = METRICS,
) -> Results:
  """Metrics of what `function` makes of images.

  With a mesh it is a collective: every process gives as many batches of its own, and gets the
  metrics of the images of all. Reconstructions stay where they are measured.

  Args:
    function, batches, mesh: see `outputs`.
    metrics: what to measure.

  Raises:
    UserError: there is no batch.
  """
  total = None
  for batch, result in outputs(function, batches, mesh):
    found = Results.of(Batch(batch["image"], result), metrics)
    total = found if total is None else total.merge(found)
  if total is None:
    raise UserError("there are no images to evaluate")
  return total if mesh is None else of_all_processes(total)


def outputs(
  function: Callable[[Any], T],
  batches: Iterable[Images],
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[tuple[Images, T]]:
  """Each batch of this process and what `function` makes of it, NumPy arrays of its valid rows.

  A batch is started before the results of the one before it are fetched, all at once, so that the
  devices work while the caller measures.

  Args:
    function: compiled, of images uint8 [B, H, W, 3]: of a global array with a mesh, else of the
      NumPy array. It returns a tree of arrays [B, ...], with a mesh split over the batch as the
      images are.
    batches: {"image": uint8 [b, H, W, 3], "valid": bool [b], other names: [b, ...]}, such as
      `pipeline.eval_batches` or `in_batches` yield.
    mesh: over whose devices a global batch is split; None for one device, the default.
  """
  placement = None if mesh is None else sharding.batch_sharding(mesh)

  def start(batch: Images) -> T:
    if placement is None:
      return function(batch["image"])
    result = function(sharding.to_global(batch["image"], placement))
    return multihost_utils.global_array_to_host_local_array(result, mesh, placement.spec)

  def fetch(batch: Images, result: T) -> tuple[Images, T]:
    rows = batch["valid"]
    return jax.tree.map(lambda x: np.asarray(x)[rows], (dict(batch), jax.device_get(result)))

  started = None
  for batch in batches:
    before, started = started, (batch, start(batch))
    if before is not None:
      yield fetch(*before)
  if started is not None:
    yield fetch(*started)


def in_batches(images: UInt8[np.ndarray, "n h w 3"], size: int) -> list[dict[str, np.ndarray]]:
  """Batches of one shape, for `outputs`; the last repeats its last image, which is not valid."""
  size = min(size, len(images))
  out = []
  for start in range(0, len(images), size):
    rows = np.arange(start, start + size)
    last = len(images) - 1
    out.append({"image": images[np.minimum(rows, last)], "valid": rows <= last})
  return out


def of_all_processes(local: Results) -> Results:
  """Merges the metrics of every process, in their order; a collective with one result for all.

  Arrays travel as the bytes of an `.npz` file: their lengths may differ between processes, and
  float64 and int64 arrive as they are.
  """
  if jax.process_count() == 1:
    return local
  arrays, structure = jax.tree.flatten(local)
  file = io.BytesIO()
  np.savez(file, *arrays)
  ours = np.frombuffer(file.getvalue(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(ours)))
  files = multihost_utils.process_allgather(np.pad(ours, (0, sizes.max() - len(ours))))

  def read(file: np.ndarray) -> Results:
    with np.load(io.BytesIO(file.tobytes())) as found:
      return jax.tree.unflatten(structure, [found[name] for name in found.files])

  parts = (read(file[:size]) for file, size in zip(files, sizes, strict=True))
  return functools.reduce(Results.merge, parts)
