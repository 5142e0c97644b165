"""Images in Parquet files as Hugging Face publishes them."""

import collections
import concurrent.futures
import hashlib
import importlib
import json
import logging
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coda_jax import storage
from coda_jax.data import shards, text
from coda_jax.data.decode import UnreadableImage
from coda_jax.data.folder import ONLY_ON_DISK
from coda_jax.data.labels import number_labels
from coda_jax.data.records import first_line
from coda_jax.errors import UserError

log = logging.getLogger("coda_jax")

_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
_KEPT_BYTES = 1 << 28  # of row groups in memory, per process
_LARGE_BYTES = 1 << 26  # of a row group: reading it takes longer than decoding an image
_THREADS = 16  # that read footers and labels


def _pyarrow() -> Any:
  try:
    return importlib.import_module("pyarrow.parquet")
  except ImportError as e:
    raise UserError(
      "parquet: needs pyarrow, the extra 'parquet': pip install 'coda_jax[parquet]'"
    ) from e


class ParquetSource:
  """Images in the column `image` (or the first of the type Image), labels in `label`.

  The image column is a struct of `bytes` and `path`, or the encoded bytes themselves. Labels are
  class names, or numbers: of the names that Hugging Face's metadata list (`ClassLabel`), otherwise
  0 to the largest label of all splits. Images are read by row groups, of which the last few stay in
  memory; an order that jumps about reads a whole group for an image.

  Raises:
    UserError: pyarrow is not installed; no such folder, file or split; a file is damaged or has
      other columns than the rest; no images, or labels that number no classes.
  """

  skipped: Mapping[str, int] = {}

  def __init__(self, path: str | os.PathLike, split: str | None = None):
    parquet = _pyarrow()
    root = storage.on_disk(path, ONLY_ON_DISK)
    files = shards.find(root, split, ".parquet")
    self._files = [str(f) for f in files]
    self._stats = [shards.stat(f) for f in self._files]
    footers = _of_all(lambda file: _read(parquet.read_metadata, file), self._files)
    self._image, self._paths, features, label = _columns(footers[0], self._files[0])
    groups = [
      (file, group, footer.row_group(group))
      for file, footer in enumerate(footers)
      for group in range(footer.num_row_groups)
    ]
    self._groups = np.array([(file, group) for file, group, _ in groups], "<i4").reshape(-1, 2)
    self._ends = np.cumsum([group.num_rows for *_, group in groups], dtype="<i8")
    self._sizes = [group.total_byte_size for *_, group in groups]
    self._where = f"parquet:{root}" + (f"@{split}" if split else "")
    if not len(self):
      raise UserError(f"{self._where} holds no images")
    if (mean := sum(self._sizes) // len(self._sizes)) > _LARGE_BYTES:
      log.warning(
        "%s: its row groups have %d MB each, and an image in shuffled order reads a whole one; to"
        " train on the images, copy them once with write_arrayrecord",
        self._where,
        mean >> 20,
      )
    self.class_names, self._labels = self._read_labels(parquet, root, files, label, features)
    self._images = _Kept(self._image_column)

  def _read_labels(
    self,
    parquet: Any,
    root: pathlib.Path,
    files: Sequence[pathlib.Path],
    column: str | None,
    features: Mapping[str, Any],
  ) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and the label of every row, -1 for none."""
    if column is None:
      return (), np.full(len(self), -1, "<i4")

    def read(file: str) -> list:
      return self._values(parquet, file, column)

    own = [label for labels in _of_all(read, self._files) for label in labels]
    feature = features.get(column)
    names = feature.get("names") if isinstance(feature, dict) else None
    beside = [] if names else shards.splits(root, ".parquet").values()
    others = {str(f) for split in beside for f in split} - {str(f) for f in files}
    more = {label for labels in _of_all(read, sorted(others)) for label in set(labels)}
    return number_labels(own, names=names, others=more, where=self._where)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def _place(self, row: int) -> tuple[int, int]:
    """Number of the row's group, and the row in it."""
    number = int(np.searchsorted(self._ends, row, side="right"))
    return number, row - (int(self._ends[number - 1]) if number else 0)

  def __getitem__(self, row: int) -> tuple[bytes, int]:
    if not 0 <= row < len(self):
      raise IndexError(row)
    number, place = self._place(row)
    value = self._images.get(number)[place].as_py()
    data = value["bytes"] if isinstance(value, dict) else value
    if data is None:
      raise UnreadableImage("the file holds no bytes of it")
    return data, int(self._labels[row])

  def name(self, row: int) -> str:
    number, place = self._place(row)
    file = int(self._groups[number, 0])
    name = f"{self._files[file]} row {row - self._first_row(file)}"
    try:
      path = self._column(number, self._paths)[place].as_py()["path"]
    except Exception:  # the file is damaged, or there is no such column
      return name
    return f"{name} ({path})" if path else name

  def _first_row(self, file: int) -> int:
    before = int(np.searchsorted(self._groups[:, 0], file))
    return int(self._ends[before - 1]) if before else 0

  def _image_column(self, number: int) -> Any:
    return self._column(number, self._image)

  def _column(self, number: int, column: str | None) -> Any:
    """A column of a row group. Raises UnreadableImage if it cannot be read."""
    file, group = (int(n) for n in self._groups[number])
    name = self._files[file]
    try:
      if shards.stat(name) != self._stats[file]:
        raise UnreadableImage(f"{name} changed since it was opened")
      with _pyarrow().ParquetFile(name) as opened:
        return opened.read_row_group(group, columns=[column], use_threads=False).column(0)
    except UnreadableImage:
      raise
    except Exception as e:  # pyarrow raises its own types
      raise UnreadableImage(f"row group {group} of {name}: {first_line(e)}") from e

  def captions(self) -> Iterator[list[str]]:
    """The captions of every row; see `data.text`."""
    parquet = _pyarrow()
    for file in self._files:
      names = _read(parquet.read_schema, file).names
      column = next((c for c in text.COLUMNS if c in names), None)
      if column is None:
        raise UserError(f"{file} has no column of captions; its columns: {', '.join(names)}")
      values = self._values(parquet, file, column)
      try:
        yield from (text.texts({column: value}) for value in values)
      except ValueError as e:
        raise UserError(f"{file}: {e}") from e

  @staticmethod
  def _values(parquet: Any, file: str, column: str) -> list:
    """All values of a column."""
    table = _read(lambda f: parquet.read_table(f, columns=[column], use_threads=False), file)
    return table.column(0).to_pylist()

  def fingerprint(self) -> str:
    """SHA-256 of the files' names, the rows and bytes of their groups, the labels and classes."""
    names = [os.path.basename(f) for f in self._files]
    found = hashlib.sha256(json.dumps([names, self._sizes, self.class_names]).encode())
    for part in (self._groups, self._ends, self._labels):
      found.update(part.tobytes())
    return found.hexdigest()


class _Kept:
  """The row groups that were read last, by their numbers. A copy in another process is empty.

  Args:
    read: what reads one.
  """

  def __init__(self, read: Callable[[int], Any]):
    self._read = read
    self._kept: collections.OrderedDict[int, Any] = collections.OrderedDict()
    self._lock, self._locks = threading.Lock(), [threading.Lock() for _ in range(_THREADS)]

  def __reduce__(self) -> tuple:
    return _Kept, (self._read,)

  def get(self, number: int) -> Any:
    """A row group. Threads that want the same one wait for the first of them."""
    with self._locks[number % len(self._locks)]:
      with self._lock:
        if number in self._kept:
          self._kept.move_to_end(number)
          return self._kept[number]
      column = self._read(number)
      with self._lock:
        self._kept[number] = column
        while len(self._kept) > 1 and sum(c.nbytes for c in self._kept.values()) > _KEPT_BYTES:
          self._kept.popitem(last=False)
      return column


def _columns(footer: Any, file: str) -> tuple[str, str | None, Mapping[str, Any], str | None]:
  """Columns of images, of their paths and labels, and the features that the metadata name."""
  schema = footer.schema.to_arrow_schema()
  try:
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
  except (TypeError, KeyError, ValueError):  # no metadata, or somebody else's
    features = {}
  kinds = {k: v.get("_type") for k, v in features.items() if isinstance(v, dict)}
  images = [k for k in schema.names if kinds.get(k) == "Image"]
  images += [k for k in _IMAGE_COLUMNS if k in schema.names]
  for image in dict.fromkeys(images):
    kind = str(schema.field(image).type)
    labels = [k for k in _LABEL_COLUMNS if k in schema.names]
    labels += [k for k in schema.names if kinds.get(k) == "ClassLabel"]
    label = next((k for k in labels if _is_label(str(schema.field(k).type))), None)
    if kind.startswith("struct<") and "bytes: " in kind:
      return f"{image}.bytes", f"{image}.path" if "path: " in kind else None, features, label
    if "binary" in kind:
      return image, None, features, label
  raise UserError(f"{file} has no column of encoded images; its columns: {', '.join(schema.names)}")


def _is_label(kind: str) -> bool:
  return kind in ("string", "large_string", "bool") or kind.removeprefix("u").startswith("int")


def _read(read: Callable[[str], Any], file: str | pathlib.Path) -> Any:
  try:
    return read(str(file))
  except Exception as e:  # pyarrow raises its own types
    raise UserError(f"{file} cannot be read: {first_line(e)}; fetch it again") from e


def _of_all(f: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
  with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
    return list(threads.map(f, items))
