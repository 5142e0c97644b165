"""Which image stands at which place of the stream.

The stream of training images is a pure function of (seed, global index). Image g of the stream is
row permutation(seed, g // n)[g % n] of the n rows. Its crop depends on (seed, g) alone. So neither
the number of processes nor a restart changes the stream, and a checkpoint needs only the count of
images consumed.

Nothing here calls jax, because worker processes run it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from grain.experimental import index_shuffle

from coda_jax.data import decode, rng, sources

MAX_ATTEMPTS = 16  # rows that are tried for one place of the training stream


def source_row(seed: int, global_index: int, n: int, attempt: int = 0) -> int:
  """The row that image `global_index` of the training stream is read from.

  Every epoch of n images is a permutation of all n rows.

  Args:
    attempt: 0, or the number of the replacement for rows that could not be read.
  """
  if attempt:
    return rng.words(seed, rng.Stream.REPLACEMENT, global_index, attempt)[0] % n
  epoch, position = divmod(global_index, n)
  if n == 1:
    return 0
  epoch_seed = rng.words(seed, rng.Stream.EPOCH, epoch)[0] % 2**32
  return index_shuffle(position, max_index=n - 1, seed=epoch_seed, rounds=4)


@dataclasses.dataclass(frozen=True)
class ImageStream:
  """The images of training, or of one pass of evaluation, by their global index.

  Attributes:
    source: the images.
    image_size, resize_ratio: as for `decode.resize_and_crop`.
    crop: where an image is cropped.
    seed: decides order, crops and mirroring.
    flip: mirrors every second image at random.
    rows: images of an evaluation's pass, spread evenly over the source; None for the endless
      shuffled stream.
  """

  source: sources.ImageSource
  image_size: int
  resize_ratio: float | None
  crop: Literal["center", "random"]
  seed: int
  flip: bool
  rows: int | None

  def _row(self, g: int, attempt: int) -> int:
    n = len(self.source)
    return source_row(self.seed, g, n, attempt) if self.rows is None else g * n // self.rows

  def load(self, global_indices: Sequence[int]) -> dict[str, Any]:
    """Part of a batch as `pipeline.Batches` describes it.

    The key `failed` lists (row, reason) of what could not be read: the main process counts and
    logs.
    """
    b = len(global_indices)
    part = {
      "image": np.zeros((b, self.image_size, self.image_size, 3), np.uint8),
      "label": np.full(b, -1, np.int32),
      "index": np.full(b, -1, np.int64),
      "valid": np.zeros(b, bool),
      "failed": [],
    }
    for i, g in enumerate(global_indices):
      if self.rows is not None and g >= self.rows:  # padding
        continue
      words = rng.words(self.seed, rng.Stream.CROP, g)
      # An evaluation leaves out what it cannot read: a replacement would count another one twice.
      for attempt in range(MAX_ATTEMPTS if self.rows is None else 1):
        row = self._row(g, attempt)
        try:
          data, label = self.source[row]
          part["image"][i] = decode.resize_and_crop(
            decode.decode_image(data),
            self.image_size,
            resize_ratio=self.resize_ratio,
            position=(words[0], words[1]) if self.crop == "random" else None,
            flip=self.flip and words[2] % 2 == 1,
          )
        except (decode.UnreadableImage, OSError) as e:
          part["failed"].append((row, str(e)))
          continue
        part["label"][i], part["index"][i], part["valid"][i] = label, row, True
        break
    return part
