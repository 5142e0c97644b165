"""Images by number, for an evaluation: those of a data spec, of a folder, or of one file."""

import concurrent.futures
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from coda_jax.data import decode, sources
from coda_jax.data.image_stream import ImageStream
from coda_jax.errors import UserError
from coda_jax.evaluation.image_files import ImageFile, sha256
from coda_jax.evaluation.record import Side, preprocessing

_PART = 8  # images that a thread decodes at a time


@runtime_checkable
class Reader(Protocol):
  """Images of one size by number.

  Attributes:
    count: how many.
    size: height and width.
    identity: JSON of all that decides the images.
    side: the same for records.
  """

  count: int
  size: tuple[int, ...]
  identity: dict[str, Any]
  side: Side

  def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(images uint8 [n, h, w, 3], which could be read bool [n], why others could not)."""
    ...

  def name(self, index: int) -> str:
    """What a person calls an image."""
    ...


class SpecImages:
  """Crops of the images of a data spec, each once, or an endless stream of random ones.

  Args:
    spec: as for `sources.open_source`.
    image_size, resize_ratio, crop, seed: as for `pipeline.eval_batches`.
    limit: so many images, spread evenly; None takes all.
    stream: so many crops of the endless shuffled stream instead, half of them mirrored.

  Raises:
    UserError: data that cannot be opened.
  """

  def __init__(
    self,
    spec: str,
    image_size: int,
    resize_ratio: float | None,
    *,
    crop: Literal["center", "random"] = "center",
    seed: int = 0,
    limit: int | None = None,
    stream: int | None = None,
  ):
    source = sources.open_source(spec)
    rows = len(source) if limit is None else min(limit, len(source))
    self.count, self._source = stream or rows, source
    self.size: tuple[int, ...] = (image_size, image_size)
    endless = stream is not None
    self._stream = ImageStream(
      source, image_size, resize_ratio, crop, seed, endless, None if endless else rows
    )
    cut = preprocessing(image_size, resize_ratio, "centre" if crop == "center" else crop)
    self.identity: dict[str, Any] = {
      "source": source.fingerprint(),
      "images": self.count,
      "stream": endless,
      "seed": seed if crop == "random" else None,
      **cut,
    }
    self.side = Side(spec, self.count, self.identity["source"], **cut)

  def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    parts = [indices[i : i + _PART] for i in range(0, len(indices), _PART)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
      found = list(pool.map(self._stream.load, parts))
    failed = [
      f"{self._source.name(row)} ({reason})" for part in found for row, reason in part["failed"]
    ]
    images, valid = (np.concatenate([p[key] for p in found]) for key in ("image", "valid"))
    return images, valid, failed

  def name(self, index: int) -> str:
    row = self._stream._row(index, 0)
    return os.path.basename(self._source.name(row))


class SampleFiles:
  """Images of an `.npz` or `.npy` file, or of the image files of a folder, as they are.

  Raises:
    UserError: missing, damaged, without images, or images of several sizes.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    if path.is_dir():
      self._source = sources.open_source(f"folder:{path}")
      self._file, self.count = None, len(self._source)
      self.size: tuple[int, ...] = self._read(0).shape[:2]
      hashed = self._source.fingerprint()
    else:
      self._file = ImageFile(path)
      self.count, self.size = len(self._file), tuple(self._file.shape[1:3])
      hashed = sha256(path)
    self.identity: dict[str, Any] = {"samples": hashed, "images": self.count}
    self.side = Side(os.fspath(path), self.count, hashed, "as stored", "as stored")

  def load(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    if self._file is not None:
      images = self._file[indices[0] : indices[-1] + 1]
    else:
      with concurrent.futures.ThreadPoolExecutor() as pool:
        images = list(pool.map(self._read, indices))
      for i, image in zip(indices, images, strict=True):
        if image.shape[:2] != self.size:
          (h, w), (height, width) = image.shape[:2], self.size
          raise UserError(
            f"{self.path} holds images of several sizes: {self.name(0)} has {width} x {height} "
            f"pixels, {self.name(i)} {w} x {h}; samples are of one size"
          )
      images = np.stack(images)
    return images, np.ones(len(indices), bool), []

  def _read(self, row: int) -> np.ndarray:
    try:
      return np.asarray(decode.decode_image(self._source[row][0]))
    except (decode.UnreadableImage, OSError) as e:
      raise UserError(f"{self._source.name(row)} cannot be read: {e}; restore or remove it") from e

  def name(self, index: int) -> str:
    if self._file is not None:
      return str(index)
    return os.path.basename(self._source.name(index))


def batches(
  reader: Reader, indices: range, size: int, failed: list[str]
) -> Iterator[dict[str, np.ndarray]]:
  """{"image": uint8 [size, h, w, 3], "valid", "index": [size]}; the last repeats its last image.

  The next batch is read while the caller works. Reasons of unreadable images go to `failed`.
  """

  def read(start: int) -> dict[str, np.ndarray]:
    part = indices[start : start + size]
    images, valid, reasons = reader.load(part)
    failed.extend(reasons)
    rows = np.minimum(np.arange(size), len(part) - 1)
    valid = valid[rows] & (np.arange(size) < len(part))
    return {"image": images[rows], "valid": valid, "index": np.asarray(part)[rows]}

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    ahead = None
    for start in [*range(0, len(indices), size), None]:
      before, ahead = ahead, None if start is None else pool.submit(read, start)
      if before is not None:
        yield before.result()
