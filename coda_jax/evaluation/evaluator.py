"""One evaluation for trainers and commands: images in, metrics out, over devices and processes."""

import functools
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import UInt8

from coda_jax import sharding
from coda_jax.errors import UserError
from coda_jax.evaluation.metrics import METRICS, Metric, Results
from coda_jax.evaluation.reconstruction import Batch, BatchResult

T = TypeVar("T")  # a tree of arrays [B, ...]


@runtime_checkable
class Mergeable(Protocol):
  """A tree of arrays, measured on some images."""

  def merge(self, other: Any) -> Any:
    """Of the images of both."""
    ...


M = TypeVar("M", bound=Mergeable)
Images = Mapping[str, np.ndarray]  # a batch: "image", "valid" and perhaps more, all [b, ...]


def evaluate(
  function: Callable[[Any], BatchResult],
  batches: Iterable[Images],
  *,
  mesh: jax.sharding.Mesh | None = None,
  metrics: Sequence[type[Metric]] = METRICS,
) -> Results:
  """Metrics of the reconstructions that `function` makes of images.

  With a mesh this is a collective: every process gives the same number of batches, of its own
  images, and every process gets the metrics of all images. Reconstructions stay on their process.

  Args:
    function, batches, mesh: see `outputs`.
    metrics: the classes to measure.

  Raises:
    UserError: there is no batch.
  """
  total = None
  for batch, result in outputs(function, batches, mesh):
    found = Results.of(Batch(batch["image"], result), metrics)
    total = found if total is None else total.merge(found)
  if total is None:
    raise UserError("there are no images to evaluate")
  if mesh is None:
    return total
  return of_processes(total, [first for first, *_ in sharding.batch_parts(mesh)])


def outputs(
  function: Callable[[Any], T],
  batches: Iterable[Images],
  mesh: jax.sharding.Mesh | None = None,
) -> Iterator[tuple[Images, T]]:
  """Yields (batch, `function` of its images) for each batch of this process, valid rows alone.

  Both are NumPy arrays. Results are fetched once a batch, after the next batch was started: the
  devices compute while the caller measures.

  Args:
    function: a compiled function of images uint8 [B, H, W, 3], with a mesh a global array, else
      the NumPy array of the batch. It returns a tree of arrays [B, ...]; with a mesh they are
      split over the batch as the images are (`out_shardings=sharding.batch_sharding(mesh)`).
    batches: {"image": uint8 [b, H, W, 3], "valid": bool [b], other names: [b, ...]}, such as
      `pipeline.eval_batches` or `in_batches` yield.
    mesh: its batch axes split a global batch; None computes on the default device.
  """

  def start(batch: Images) -> T:
    if mesh is None:
      return function(batch["image"])
    placement = sharding.batch_sharding(mesh)
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
  """Batches of one shape for `outputs`. The last repeats its last image; repeats are not valid."""
  size = min(size, len(images))
  out = []
  for start in range(0, len(images), size):
    rows = np.arange(start, start + size)
    last = len(images) - 1
    out.append({"image": images[np.minimum(rows, last)], "valid": rows <= last})
  return out


def of_processes(local: M, processes: Sequence[int]) -> M:
  """Merges a metric or sums of some processes, in this order; a collective of all processes.

  One process after the other sends its arrays as the bytes of an `.npz` file, so that a host holds
  two of them at a time, however many there are: counts are sums, and large. The lengths may differ,
  and float64 and int64 keep their bits, which a sum of JAX arrays would cut to 32.
  """
  if jax.process_count() == 1:
    return local
  arrays, structure = jax.tree.flatten(local)
  file = io.BytesIO()
  np.savez(file, *arrays)
  ours = np.frombuffer(file.getvalue(), np.uint8)
  sizes = np.ravel(multihost_utils.process_allgather(np.int32(len(ours))))
  ours = np.pad(ours, (0, sizes.max() - len(ours)))

  def of(process: int) -> M:
    sent = multihost_utils.broadcast_one_to_all(ours, jax.process_index() == process)
    with np.load(io.BytesIO(np.asarray(sent)[: sizes[process]].tobytes())) as found:
      return jax.tree.unflatten(structure, [found[name] for name in found.files])

  return functools.reduce(lambda a, b: a.merge(b), map(of, processes))
