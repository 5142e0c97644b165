"""Images in the tar shards of WebDataset, in any order."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping

import numpy as np

from coda_jax import storage
from coda_jax.data import shards, tar_index, text
from coda_jax.data.decode import UnreadableImage
from coda_jax.data.folder import ONLY_ON_DISK
from coda_jax.data.labels import number_labels
from coda_jax.errors import UserError


class WebDatasetSource:
  """Images in tar files: members of one name, `x.jpg` with its label in `x.cls` or `x.json`.

  `.cls` holds a number or a class name, `.json` one of them under `label`, `cls`, `class` or
  `class_id`. Classes are 0 to the largest number, or the sorted names of all splits. Captions stand
  in `x.txt` or `x.json` (`data.text`). Where the images lie is found once and kept in an index
  (`tar_index`).

  Attributes:
    skipped: how many members are not read, by their ending.

  Raises:
    UserError: no such folder, file or split; a tar is damaged or compressed; no images in it, or
      labels that number no classes.
  """

  def __init__(self, path: str | os.PathLike, split: str | None = None):
    root = storage.on_disk(path, ONLY_ON_DISK)
    files = shards.find(root, split, ".tar")
    name = split or (root.stem if root.is_file() else "all")
    self._where = f"webdataset:{root}" + (f"@{split}" if split else "")
    self._files = [str(f) for f in files]
    self._stats = [shards.stat(f) for f in files]
    index = tar_index.load(files, name)
    self.skipped: Mapping[str, int] = index.skipped
    self._ends_of_tars = np.cumsum(index.counts)
    self._offsets, self._sizes = index.offsets, index.sizes
    self._names, self._ends = index.names, index.ends
    self._texts = index.texts
    if not len(self):
      there = ", ".join(f"{n:,} {ending}" for ending, n in self.skipped.items()) or "nothing"
      raise UserError(f"{self._where} holds no images, only {there}")
    others: set[int | str | None] = set()
    if any(isinstance(label, str) for label in index.labels):
      for other, tars in shards.splits(root, ".tar").items():
        others |= {*tar_index.load(tars, other).labels} if other != split else set()
    self.class_names, self._labels = number_labels(
      index.labels, names=None, others=others, where=self._where
    )

  def __len__(self) -> int:
    return len(self._offsets)

  def _tar(self, row: int) -> int:
    return int(np.searchsorted(self._ends_of_tars, row, side="right"))

  def __getitem__(self, row: int) -> tuple[bytes, int]:
    data = self._read(self._tar(row), int(self._offsets[row]), int(self._sizes[row]))
    return data, int(self._labels[row])

  def _read(self, tar: int, offset: int, size: int) -> bytes:
    with open(self._files[tar], "rb") as f:
      stat = os.fstat(f.fileno())
      if (stat.st_size, stat.st_mtime_ns) != self._stats[tar]:
        raise UnreadableImage(f"{self._files[tar]} changed since it was indexed")
      f.seek(offset)
      return f.read(size)

  def captions(self) -> Iterator[list[str]]:
    """The captions of every row; see `data.text`."""
    for row, (offset, size, kind) in enumerate(self._texts.tolist()):
      try:
        data = self._read(self._tar(row), offset, size).decode() if kind else ""
        yield text.texts(json.loads(data)) if kind == 2 else text.clean([data])
      except (UnreadableImage, OSError, ValueError, AttributeError) as e:
        raise UserError(f"{self.name(row)}: its captions cannot be read: {e}") from e

  def name(self, row: int) -> str:
    start = self._ends[row - 1] if row else 0
    member = self._names[start : self._ends[row]].decode(errors="replace")
    return f"{self._files[self._tar(row)]} member {member}"

  def fingerprint(self) -> str:
    """SHA-256 of the classes, and of the names, bytes and labels of the images."""
    found = hashlib.sha256(json.dumps(self.class_names).encode())
    for part in (self._names, self._ends, self._sizes, self._labels):
      found.update(part if isinstance(part, bytes) else part.tobytes())
    return found.hexdigest()
