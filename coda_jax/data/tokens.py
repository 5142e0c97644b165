"""Tokens of images in ArrayRecord files, and batches of them.

A directory holds `manifest.json` and shards `tokens-00000-of-00004.array_record`. A record holds k
images, because reading costs as much for a record of one image as for one of many. The record is
the header, labels int32 [k], and ids [k, N] of uint16 or, above 65,536 codes, int32; all
little-endian.

With texts (the manifest's `text`) every shard has a file `text-00000-of-00004.array_record` more: a
record is one caption in UTF-8, or its embedding float16 [T, D]. A batch reads one caption an image.
Instead of labels the records of tokens hold int32 [k, 3]: label, the image's first record in that
file, and how many captions it has.

The stream of training images is a pure function of (seed, global index). Every epoch permutes the
records and cuts them into windows of `_WINDOW` records. The images of a window are permuted, and
windows follow one another.
"""

import dataclasses
import functools
import hashlib
import io
import json
import os
import struct
import threading
from collections.abc import Callable, Mapping

import grain
import numpy as np

from coda_jax import storage
from coda_jax.data import records, rng
from coda_jax.data.pipeline import local_size
from coda_jax.errors import UserError

FORMAT = "coda_jax tokens 1"
MANIFEST = "manifest.json"
RECORD_IMAGES = 64  # k, but for the last record of a shard
# Magic, bytes of an id, numbers of an image beside its label (0 or 2), images, tokens of an image.
_HEADER = struct.Struct("<4sHHII")
_MAGIC = b"CJT1"
_ID_TYPES = {2: "<u2", 4: "<i4"}  # by their bytes
_WINDOW = 256
_KEYS = frozenset({"complete", "class_names", "patch_sizes", "shards"})
_MEND = "restore it, or remove it and run the same `coda_jax.tokenize_dataset` again"


def id_type(codebook_size: int) -> type:
  """The type that ids are kept in."""
  return np.uint16 if codebook_size <= 2**16 else np.int32


def pack(ids: np.ndarray, labels: np.ndarray) -> bytes:
  """A record of ids [k, N] and labels [k], or with texts [k, 3]."""
  more = labels.shape[1] - 1 if labels.ndim == 2 else 0
  header = _HEADER.pack(_MAGIC, ids.dtype.itemsize, more, *ids.shape)
  return header + labels.astype("<i4").tobytes() + np.ascontiguousarray(ids).tobytes()


def unpack(record: bytes) -> tuple[np.ndarray, np.ndarray]:
  """(ids [k, N], labels int32 [k] or [k, 3]), as `pack` had them.

  Raises ValueError if the bytes are no record.
  """
  header = record[: _HEADER.size].ljust(_HEADER.size, b"\0")
  magic, size, more, images, tokens = _HEADER.unpack(header)
  numbers = images * (1 + more)
  whole = len(record) == _HEADER.size + 4 * numbers + size * images * tokens
  if magic != _MAGIC or size not in _ID_TYPES or not whole:
    raise ValueError("not a record of tokens")
  labels = np.frombuffer(record, "<i4", numbers, _HEADER.size)
  ids = np.frombuffer(record, _ID_TYPES[size], images * tokens, _HEADER.size + 4 * numbers)
  return ids.reshape(images, tokens), labels.reshape(images, 1 + more) if more else labels


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


def text_file(shard: str) -> str:
  """The name of the file with a shard's texts."""
  return f"text{shard.removeprefix('tokens')}"


class TokenSource:
  """The tokens of a directory, record by record.

  Attributes:
    manifest: its `manifest.json`.
    class_names: of the labels.
    tokens: N of an image.
    text: what the directory holds of captions, the manifest's `text`; None for nothing.

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
    self._ends = np.cumsum([-(-s["images"] // RECORD_IMAGES) for s in self._shards])
    if not sizes:
      raise UserError(f"{path} holds no images")
    self._records = records.read(self._files, len(sizes), self.path / MANIFEST, mend=_MEND)
    self.text: dict | None = self.manifest.get("text")
    if self.text is not None:
      if self.text["kind"] not in ("captions", "embeddings"):
        kind = self.text["kind"]
        raise UserError(f"{path} holds texts as {kind!r}, which this version does not read")
      counts = [s["captions"] for s in self._shards]
      files = [self.path / text_file(s["file"]) for s in self._shards]
      self._texts = records.read(files, sum(counts), self.path / MANIFEST, mend=_MEND)
      self._first_texts = np.cumsum([0, *counts])  # of each shard, and the end

  def __len__(self) -> int:
    return int(self.sizes.sum())

  def records(self, rows) -> tuple[np.ndarray, np.ndarray]:
    """(ids [k, N], labels int32 [k]) of the images of some records, in their order.

    With texts labels are [k, 3]: label, the number of the first caption for `texts`, and how many.
    """
    try:
      found = [unpack(r) for r in self._records.__getitems__([int(r) for r in rows])]
    except Exception as e:
      raise UserError(f"{self._first_damaged(rows)} is damaged ({e}); {_MEND}") from e
    if self.text is not None:
      firsts = [self._first_texts[self._shard(int(row))] for row in rows]
      found = [(ids, labels + [0, n, 0]) for (ids, labels), n in zip(found, firsts, strict=True)]
    ids, labels = zip(*found, strict=True)
    return np.concatenate(ids), np.concatenate(labels)

  def texts(self, numbers) -> list[str] | np.ndarray:
    """Captions by their numbers, or their embeddings float16 [b, T, D]."""
    assert self.text is not None
    try:
      found = self._texts.__getitems__([int(n) for n in numbers])
      if self.text["kind"] == "captions":
        return [record.decode() for record in found]
      return np.stack([np.frombuffer(record, "<f2") for record in found]).reshape(
        len(found), self.text["tokens"], self.text["width"]
      )
    except Exception as e:
      raise UserError(f"the texts of {self.path} are damaged ({e}); {_MEND}") from e

  def empty(self) -> np.ndarray:
    """The embedding of the empty caption, float16 [T, D]."""
    assert self.text is not None and self.text["kind"] == "embeddings"
    file = self.path / self.text["empty"]
    try:
      found = np.load(io.BytesIO(file.read_bytes()))
      return found.astype(np.float16).reshape(self.text["tokens"], self.text["width"])
    except (OSError, ValueError) as e:
      raise UserError(f"{file} is missing or damaged ({e}); {_MEND}") from e

  def _shard(self, row: int) -> int:
    """The shard that holds a record."""
    return int(np.searchsorted(self._ends, row, "right"))

  def _first_damaged(self, rows) -> storage.Path:
    """The file that holds the first of some records that is not one."""
    for row in map(int, rows):
      try:
        unpack(self._records[row])
      except Exception:
        return self._files[self._shard(row)]
    return self.path

  def fingerprint(self) -> str:
    """SHA-256 of the manifest."""
    return hashlib.sha256(json.dumps(self.manifest, sort_keys=True).encode()).hexdigest()


class _Stream:
  """Which image stands at a global index."""

  def __init__(self, source: TokenSource, seed: int, tokenize: Callable | None):
    self._source, self._seed, self._lock = source, seed, threading.Lock()
    self._tokenize = tokenize
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
    ids, labels, first = [], [], start
    n = len(self._source)
    while count:
      epoch, position = divmod(start, n)
      with self._lock:  # two threads must not read one window twice
        _, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, position, "right")) - 1
        all_ids, all_labels = self._window(epoch, window)
      offset = position - int(starts[window])
      part = slice(offset, offset + count)
      ids.append(all_ids[part])
      labels.append(all_labels[part])
      start, count = start + len(ids[-1]), count - len(ids[-1])
    condition = np.concatenate(labels)
    if self._source.text is not None:
      condition = self._texts(condition, first)
    return {"ids": np.concatenate(ids), "condition": condition}

  def _texts(self, labels: np.ndarray, start: int) -> np.ndarray:
    """One text of each image, chosen by the image's place in the stream."""
    words = (
      rng.words(self._seed, rng.Stream.CAPTION, g)[0] for g in range(start, start + len(labels))
    )
    found = self._source.texts(
      [first + word % count for (_, first, count), word in zip(labels.tolist(), words, strict=True)]
    )
    if isinstance(found, np.ndarray):
      return found
    return np.array(found, object) if self._tokenize is None else self._tokenize(found)


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

  A batch is {"ids": uint16 or int32 [b, N], "condition"}, b = batch_size / process_count. The
  condition is the labels int32 [b], or of each image one caption at random: its embedding float16
  [b, T, D], or what `tokenize` makes of it.

  Args:
    start: images consumed so far, over all processes.
    tokenize: a list of captions to an array; None for an array of the captions themselves.
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
    tokenize: Callable[[list[str]], np.ndarray] | None = None,
  ):
    local = local_size(batch_size, process_count)
    load = _LoadBatch(
      _Stream(source, seed, tokenize), start + process_index * local, batch_size, local
    )
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
