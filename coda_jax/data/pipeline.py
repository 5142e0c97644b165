"""Batches of images, made by grain on the host.

A batch is a range of global indices of an `ImageStream`. A process takes its own rows of the batch.

Images stay uint8 on the host and on the way to the device, a quarter of the bytes of float32;
`normalize` belongs in the jitted step. Nothing here calls jax, because a worker process must not
open the accelerator.
"""

import dataclasses
import logging
import os
import signal
import weakref
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np
from absl import flags
from jaxtyping import Bool

from coda_jax.data import sources
from coda_jax.data.image_stream import MAX_ATTEMPTS, ImageStream
from coda_jax.errors import UserError
from coda_jax.processes import die_with_parent

MAX_UNREADABLE = 0.01  # of the images
MAX_PART = 8  # images that grain handles as one element

logger = logging.getLogger(__name__)


def normalize(images):
  """uint8 [B,H,W,3] to float32 in [-1, 1], x / 127.5 - 1; a NumPy or JAX array, also under jit."""
  return images.astype(np.float32) / 127.5 - 1


def local_size(batch_size: int, process_count: int) -> int:
  """Images of one process in a global batch.

  Raises:
    UserError: the batch does not divide.
  """
  if batch_size < 1 or batch_size % process_count:
    raise UserError(
      f"batch size {batch_size} must be a positive multiple of the {process_count} processes"
    )
  return batch_size // process_count


def too_many_unreadable(unreadable: int, images: int, limit: float) -> bool:
  """Whether more than the part `limit` of `images` is unreadable; one may be, if there are others.

  With a limit of 0 none may be.
  """
  part = unreadable / max(1, images)
  return part > limit and (unreadable > 1 or images == 1 or limit == 0)


@dataclasses.dataclass(frozen=True)
class _LoadPart:
  """Loads a part of a batch by its number, counted over this process's batches."""

  stream: ImageStream
  first: int  # global index of this process's first image
  batch_size: int
  part: int  # images of a part
  parts: int  # parts of this process in a batch

  def __call__(self, number: int) -> dict[str, Any]:
    batch, part = divmod(number, self.parts)
    begin = self.first + batch * self.batch_size + part * self.part
    return self.stream.load(range(begin, begin + self.part))


def _concatenate(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
  batch = {k: np.concatenate([p[k] for p in parts]) for k in ("image", "label", "index", "valid")}
  return batch | {"failed": [f for p in parts for f in p["failed"]]}


def _init_worker(index: int, count: int):
  """Runs first in each worker process."""
  del index, count
  # The main process decides when to stop: a Ctrl-C must not print a traceback per worker, and a
  # preemption's SIGTERM to the whole group must leave it time to save.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  signal.signal(signal.SIGTERM, signal.SIG_IGN)

  die_with_parent()


def _check_shared_memory(needed: int):
  """Raises UserError if /dev/shm, where workers hand images over, has less than `needed` bytes.

  A worker that finds it full dies of SIGBUS without a message.
  """
  try:
    stat = os.statvfs("/dev/shm")
  except OSError:  # not Linux
    return
  free = stat.f_bavail * stat.f_frsize
  if free < needed:
    raise UserError(
      f"/dev/shm has {free >> 20} MB free and the data workers need {needed >> 20} MB: enlarge it"
      " (docker run --shm-size=8g), or use fewer data workers or a smaller batch"
    )


def _close(iterators: list[grain.DatasetIterator]):
  while iterators:  # grain's iterators complain if they outlive their module: drop them too
    iterators.pop().close()


class Batches:
  """Iterator over this process's part of every global batch.

  A batch is a dict of NumPy arrays, b = batch_size // process_count:
    image  uint8 [b,H,W,3]
    label  int32 [b], -1 where the source has no labels
    index  int64 [b], the row of the source
    valid  bool  [b], in evaluation only: False for padding and for images that could not be read
      (their image is 0, label and index are -1)

  Attributes:
    source, class_names: what is read.
    consumed: images of the global stream handed out so far, `start` included.
    read, unreadable: attempts of this process to read an image, and those that failed. Each
      unreadable file is logged once, as a warning. Too many such files raise UserError: judged
      once min(1000, max(100, len(source))) images were read, and at the end of an evaluation.
  """

  def __init__(
    self,
    stream: ImageStream,
    *,
    batch_size: int,
    start: int,
    images: int,
    process_index: int,
    process_count: int,
    workers: int,
    max_unreadable: float,
  ):
    local = local_size(batch_size, process_count)
    self.source, self.class_names = stream.source, stream.source.class_names
    self.consumed, self.read, self.unreadable = start, 0, 0
    self._batch_size, self._training = batch_size, stream.rows is None
    self._max_unreadable = max_unreadable
    self._length = -(-images // batch_size)
    self._named: set[int] = set()
    # grain handles parts of a batch: its cost per element is that of decoding a small image.
    part = next(k for k in range(min(local, MAX_PART), 0, -1) if local % k == 0)
    parts = local // part
    load = _LoadPart(stream, start + process_index * local, batch_size, part, parts)
    # About two batches are decoded ahead, in threads or in processes of two threads each.
    threads = 2 if workers else min(16, 2 * (os.cpu_count() or 1))
    ahead = threads if workers else max(threads, 2 * parts)
    dataset = grain.MapDataset.range(self._length * parts).map(load)
    dataset = dataset.to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
    )
    if workers:
      if not flags.FLAGS.is_parsed():  # grain reads its flags; notebooks and pytest parse none
        flags.FLAGS.mark_as_parsed()
      queue = max(1, parts // workers)
      _check_shared_memory(workers * (2 * queue + 2) * part * 3 * stream.image_size**2)
      dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=queue),
        worker_init_fn=_init_worker,
      )
    self._iterators = [iter(dataset.batch(parts, batch_fn=_concatenate))]
    self._finalizer = weakref.finalize(self, _close, self._iterators)

  def __len__(self) -> int:
    """Batches of one evaluation pass."""
    if self._training:
      raise TypeError("the training stream is endless")
    return self._length

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    try:
      batch = next(self._iterators[0])
    except StopIteration:
      self.close()
      self._judge(final=True)
      raise
    self._count(batch.pop("failed"), batch["valid"])
    self.consumed += self._batch_size
    if self._training:
      del batch["valid"]
    return batch

  def _count(self, failed: list[tuple[int, str]], valid: Bool[np.ndarray, " b"]):
    self.read += int(valid.sum()) + len(failed)
    self.unreadable += len(failed)
    for row, reason in failed:
      if row not in self._named:
        self._named.add(row)
        what = "replaced by another" if self._training else "left out"
        logger.warning("unreadable image %s (%s): %s", self.source.name(row), reason, what)
    if self._training and not valid.all():
      row, reason = failed[-1]
      raise UserError(
        f"{MAX_ATTEMPTS} images in a row could not be read, {self.source.name(row)} among them"
        f" ({reason}); restore or remove them"
      )
    self._judge()

  def _judge(self, final: bool = False):
    if self.read < min(1000, max(100, len(self.source))) and self._max_unreadable and not final:
      return
    read = min(self.read, len(self.source))
    if too_many_unreadable(len(self._named), read, self._max_unreadable):
      names = ", ".join(self.source.name(row) for row in sorted(self._named)[:3])
      raise UserError(
        f"{len(self._named)} of {read} images could not be read, more than"
        f" {100 * self._max_unreadable:g}%: {names}{', ...' if len(self._named) > 3 else ''};"
        " restore or remove them, or raise max_unreadable"
      )

  def close(self):
    """Stops workers and threads; it also happens when the object or the program ends."""
    self._finalizer()

  def __enter__(self):
    return self

  def __exit__(self, *exc):
    self.close()


def _open(spec_or_source: str | sources.ImageSource) -> sources.ImageSource:
  return sources.open_source(spec_or_source) if isinstance(spec_or_source, str) else spec_or_source


def train_batches(
  spec_or_source: str | sources.ImageSource,
  *,
  image_size: int,
  batch_size: int,
  seed: int,
  start: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  workers: int = 0,
  resize_ratio: float | None = 1.125,
  flip: bool = False,
  max_unreadable: float = MAX_UNREADABLE,
) -> Batches:
  """Endless shuffled random crops.

  Args:
    spec_or_source: a data spec (`sources.open_source`) or an open source.
    batch_size: images in a global batch; process p yields rows p*b to (p+1)*b of each, with
      b = batch_size // process_count.
    seed: decides the order and the crops.
    start: images consumed so far, over all processes: `Batches.consumed` of the run to continue.
    workers: worker processes; 0 decodes in threads of this process. Never changes the result.
    resize_ratio: the shorter edge becomes round(resize_ratio * image_size) before the crop; None
      crops from the image as stored.
    flip: mirrors every second image at random.
    max_unreadable: part of the images that may be unreadable; one may be, unless it is 0.

  Raises:
    UserError: bad spec, or a batch size that process_count does not divide; later, unreadable data.
  """
  source = _open(spec_or_source)
  stream = ImageStream(source, image_size, resize_ratio, "random", seed, flip, rows=None)
  return Batches(
    stream,
    batch_size=batch_size,
    start=start,
    images=2**40,  # grain wants an end: a million epochs of ImageNet
    process_index=process_index,
    process_count=process_count,
    workers=workers,
    max_unreadable=max_unreadable,
  )


def eval_batches(
  spec_or_source: str | sources.ImageSource,
  *,
  image_size: int,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  workers: int = 0,
  resize_ratio: float | None = 1.125,
  crop: Literal["center", "random"] = "center",
  seed: int = 0,
  limit: int | None = None,
  max_unreadable: float = MAX_UNREADABLE,
) -> Batches:
  """One pass over every image, in the source's order, in batches of one shape.

  The last batch is padded; `valid` is False for padding and for images that could not be read.
  The default keeps the scale at which the official code evaluates (shorter edge 288 for crops of
  256) and takes the centre instead of a random crop. crop="random" (by `seed`) is the official
  choice; resize_ratio=1 shows the whole shorter edge, as many other papers do.

  Args:
    limit: evaluate on this many images only, spread evenly over the source.
    Others as for `train_batches`.
  """
  source = _open(spec_or_source)
  rows = len(source) if limit is None else min(limit, len(source))
  stream = ImageStream(source, image_size, resize_ratio, crop, seed, flip=False, rows=rows)
  return Batches(
    stream,
    batch_size=batch_size,
    start=0,
    images=rows,
    process_index=process_index,
    process_count=process_count,
    workers=workers,
    max_unreadable=max_unreadable,
  )
