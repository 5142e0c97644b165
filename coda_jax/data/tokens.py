"""Tokens of images in ArrayRecord files, and batches of them.

A directory holds `manifest.json` and shards `tokens-00000-of-00004.array_record`. A record holds k
images, because reading costs as much for a record of one image as for one of many. The record is
the header, labels int32 [k], and ids [k, N] of uint16 or, above 65,536 codes, int32; all
little-endian.

The stream of training images is a pure function of (seed, global index). Every epoch permutes the
records and cuts them into windows of `_WINDOW` records. The images of a window are permuted, and
windows follow one another.
"""

import dataclasses
import functools
import hashlib
import json
import os
import struct
import threading
from collections.abc import Mapping

import grain
import numpy as np

from coda_jax import storage
from coda_jax.data import records, rng
from coda_jax.data.pipeline import local_size
from coda_jax.errors import UserError

FORMAT = "coda_jax tokens 1"
MANIFEST = "manifest.json"
RECORD_IMAGES = 64  # k, but for the last record of a shard
_HEADER = struct.Struct("<4sHHII")  # magic, bytes of an id, 0, images, tokens of an image
_MAGIC = b"CJT1"
_ID_TYPES = {2: "<u2", 4: "<i4"}  # by their bytes
_WINDOW = 256
_KEYS = frozenset({"complete", "class_names", "patch_sizes", "shards"})
_MEND = "restore it, or remove it and run the same `coda_jax.tokenize_dataset` again"


def id_type(codebook_size: int) -> type:
  """The type that ids are kept in."""
  return np.uint16 if codebook_size <= 2**16 else np.int32


def pack(ids: np.ndarray, labels: np.ndarray) -> bytes:
  """A record of ids [k, N] and labels [k]."""
  header = _HEADER.pack(_MAGIC, ids.dtype.itemsize, 0, *ids.shape)
  return header + labels.astype("<i4").tobytes() + np.ascontiguousarray(ids).tobytes()


def unpack(record: bytes) -> tuple[np.ndarray, np.ndarray]:
  """(ids [k, N], labels int32 [k]) of a record. Raises ValueError if the bytes are no record."""
  header = record[: _HEADER.size].ljust(_HEADER.size, b"\0")
  magic, size, _, images, tokens = _HEADER.unpack(header)
  whole = len(record) == _HEADER.size + images * (4 + size * tokens)
  if magic != _MAGIC or size not in _ID_TYPES or not whole:
    raise ValueError("not a record of tokens")
  labels = np.frombuffer(record, "<i4", images, _HEADER.size)
  ids = np.frombuffer(record, _ID_TYPES[size], images * tokens, _HEADER.size + 4 * images)
  return ids.reshape(images, tokens), labels


def read_manifest(path: str | os.PathLike) -> dict:
  """The manifest of a directory. Raises UserError if the directory holds no tokens."""
  file = storage.path(path) / MANIFEST
  if not file.is_file():
    raise UserError(f"{path} holds no tokens: no {MANIFEST}; `coda_jax.tokenize_dataset` makes it")
  try:
    manifest = json.loads(file.read_text())
    if manifest["format"] != FORMAT:
      raise ValueError(f"format {manifest['format']!r}")
    if missing := _KEYS - manifest.keys():
      raise ValueError(f"without {', '.join(sorted(missing))}")
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(
      f"{file} is no manifest of tokens ({e}); restore it, or remove {path} and run"
      " `coda_jax.tokenize_dataset` again"
    ) from e
  return manifest


class TokenSource:
  """The tokens of a directory, record by record.

  Attributes:
    manifest: its `manifest.json`.
    class_names: of the labels.
    tokens: N of an image.

  Raises:
    UserError: no tokens there, an unfinished directory, or files missing or not whole.
  """

  skipped: Mapping[str, int] = {}

  def __init__(self, path: str | os.PathLike):
    self.path, self.manifest = storage.path(path), read_manifest(path)
    if not self.manifest["complete"]:
      raise UserError(f"{path} is unfinished: run the same `coda_jax.tokenize_dataset` again")
    self.class_names = tuple(self.manifest["class_names"])
    self.tokens = sum(p * p for p in self.manifest["patch_sizes"])
    self._shards = [s for s in self.manifest["shards"] if s["images"]]
    self._files = [self.path / s["file"] for s in self._shards]
    sizes = [
      min(RECORD_IMAGES, shard["images"] - start)
      for shard in self._shards
      for start in range(0, shard["images"], RECORD_IMAGES)
    ]
    self.sizes = np.asarray(sizes, np.int64)
    if not sizes:
      raise UserError(f"{path} holds no images")
    self._records = records.read(self._files, len(sizes), self.path / MANIFEST, mend=_MEND)

  def __len__(self) -> int:
    return int(self.sizes.sum())

  def records(self, rows) -> tuple[np.ndarray, np.ndarray]:
    """(ids [k, N], labels int32 [k]) of the images of some records, in their order."""
    try:
      found = [unpack(r) for r in self._records.__getitems__([int(r) for r in rows])]
    except Exception as e:
      raise UserError(f"{self._first_damaged(rows)} is damaged ({e}); {_MEND}") from e
    ids, labels = zip(*found, strict=True)
    return np.concatenate(ids), np.concatenate(labels)

  def _first_damaged(self, rows) -> storage.Path:
    """The file that holds the first of some records that is not one."""
    ends = np.cumsum([-(-s["images"] // RECORD_IMAGES) for s in self._shards])
    for row in map(int, rows):
      try:
        unpack(self._records[row])
      except Exception:
        return self._files[int(np.searchsorted(ends, row, "right"))]
    return self.path

  def fingerprint(self) -> str:
    """SHA-256 of the manifest."""
    return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()


class _Stream:
  """Which image stands at a global index."""

  def __init__(self, source: TokenSource, seed: int):
    self._source, self._seed, self._lock = source, seed, threading.Lock()
    self._epoch = functools.lru_cache(2)(self._epoch)
    self._window = functools.lru_cache(4)(self._window)

  def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(order of the records, the index in the epoch at which each window starts, and the end)."""
    order = rng.generator(self._seed, rng.Stream.EPOCH, epoch).permutation(len(self._source.sizes))
    ends = np.cumsum(self._source.sizes[order])
    last = np.minimum(np.arange(_WINDOW, len(order) + _WINDOW, _WINDOW), len(order)) - 1
    return order, np.concatenate([[0], ends[last]])

  def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    order, _ = self._epoch(epoch)
    ids, labels = self._source.records(order[window * _WINDOW : (window + 1) * _WINDOW])
    rows = rng.generator(self._seed, rng.Stream.WINDOW, epoch, window).permutation(len(labels))
    return ids[rows], labels[rows]

  def load(self, start: int, count: int) -> dict[str, np.ndarray]:
    """Images `start` to `start + count` of the stream."""
    ids, labels = [], []
    n = len(self._source)
    while count:
      epoch, position = divmod(start, n)
      with self._lock:  # two threads must not read one window twice
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, position, "right")) - 1
        all_ids, all_labels = self._window(epoch, window)
      first = position - int(starts[window])
      part = slice(first, first + count)
      ids.append(all_ids[part])
      labels.append(all_labels[part])
      start, count = start + len(ids[-1]), count - len(ids[-1])
    return {"ids": np.concatenate(ids), "condition": np.concatenate(labels)}


@dataclasses.dataclass(frozen=True)
class _LoadBatch:
  stream: _Stream
  first: int  # global index of this process's first image
  batch_size: int
  local: int

  def __call__(self, number: int) -> dict[str, np.ndarray]:
    return self.stream.load(self.first + number * self.batch_size, self.local)


class TokenBatches:
  """Endless shuffled batches: this process's part of every global batch.

  A batch is {"ids": uint16 or int32 [b, N], "condition": int32 [b], the labels},
  b = batch_size / process_count.

  Args:
    start: images consumed so far, over all processes.
  """

  def __init__(
    self,
    source: TokenSource,
    *,
    batch_size: int,
    seed: int,
    start: int = 0,
    process_index: int = 0,
    process_count: int = 1,
  ):
    local = local_size(batch_size, process_count)
    load = _LoadBatch(_Stream(source, seed), start + process_index * local, batch_size, local)
    dataset = grain.MapDataset.range(2**40 // batch_size).map(load)
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
    self._iterators = [iter(dataset.to_iter_dataset(options))]

  def __iter__(self):
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._iterators[0])

  def close(self) -> None:
    """Stops the threads."""
    while self._iterators:
      self._iterators.pop().close()
