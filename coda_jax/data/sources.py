"""Where images come from: random access to encoded images and labels, chosen by a spec.

A source has `len()`, `source[i]` -> (encoded bytes, label), `class_names`, and `name(i)`, which
tells a person which image row i is. Sources hold no open files until read and can be pickled, so
that worker processes get a copy.

  folder:PATH@train           PATH/train/<class>/*.jpg
  folder:PATH                 PATH/*.jpg (no labels: -1) or PATH/<class>/*.jpg
  tfds:NAME@validation        a TFDS dataset prepared as array_record, or the folder it lies in
  parquet:PATH@train          PATH/train-00000-of-00294.parquet, PATH/data/train-..., or alike
  webdataset:PATH@train       tar shards, PATH/train-0000.tar
  arrayrecord:PATH@train      what `write_arrayrecord` made
  embedded@val                the photos in the repository's assets/photos/val

A path may begin with ~.
"""

import hashlib
import json
import os
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from coda_jax import outputs, storage
from coda_jax.data import records
from coda_jax.data.decode import UnreadableImage
from coda_jax.data.folder import FolderSource, subfolders
from coda_jax.data.parquet import ParquetSource
from coda_jax.data.records import first_line
from coda_jax.data.tfds import TfdsSource
from coda_jax.data.webdataset import WebDatasetSource
from coda_jax.errors import UserError

EMBEDDED_PHOTOS = pathlib.Path(__file__).parents[2] / "assets" / "photos"


@runtime_checkable
class ImageSource(Protocol):
  """Random access to encoded images. Rows never change order while a run lasts."""

  @property
  def class_names(self) -> Sequence[str]:
    """Empty when the images have no labels (label -1)."""
    ...

  def __len__(self) -> int: ...

  def __getitem__(self, row: int) -> tuple[bytes, int]:
    """Encoded bytes and label; raises OSError or UnreadableImage if they cannot be had."""
    ...

  def name(self, row: int) -> str: ...

  @property
  def skipped(self) -> Mapping[str, int]:
    """How many files beside the images are not read, by their ending."""
    ...

  def fingerprint(self) -> str:
    """A hash of the list of images, their labels and classes, wherever they lie."""
    ...


# One record: this header, the image's name in UTF-8, the encoded image up to the end.
_RECORD = struct.Struct("<4sHi")  # magic, length of the name in bytes, label
_RECORD_MAGIC = b"CJI1"
_INDEX_FORMAT = "coda_jax images 1"
_AGAIN = "remove the split's files and write it again"


class ArrayRecordSource:
  """Images in ArrayRecord files: PATH/SPLIT.json lists the files, the classes and the count.

  A record is the bytes "CJI1", then little-endian the name's length (uint16) and the label
  (int32), then the name in UTF-8, then the encoded image.

  Raises:
    UserError: missing path, unknown split, a file missing or not whole, no images.
  """

  skipped: Mapping[str, int] = {}

  def __init__(self, path: str | os.PathLike, split: str | None = None):
    path = storage.path(path)
    splits = sorted(f.stem for f in path.glob("*.json"))
    if not path.is_dir() or not splits:
      raise UserError(f"{path} is not a folder of ArrayRecord images: it holds no SPLIT.json")
    if split not in splits:
      raise UserError(
        f"ArrayRecord folder {path} {f'has no split {split!r}' if split else 'needs a split'};"
        f" there: {', '.join(splits)}"
      )
    index_file = path / f"{split}.json"
    try:
      index = json.loads(index_file.read_text())
      if index["format"] != _INDEX_FORMAT:
        raise ValueError(f"format {index['format']!r}")
      self.class_names, count = tuple(index["class_names"]), index["images"]
      files = [path / name for name in index["files"]]
    except (OSError, ValueError, KeyError, TypeError) as e:
      raise UserError(
        f"{index_file} is no list of ArrayRecord images ({e}); restore it, or {_AGAIN}"
      ) from e
    if not count:
      raise UserError(f"{index_file} lists no images")
    self._records = records.read(files, count, index_file, mend=f"restore it, or {_AGAIN}")
    self._index = [index, [storage.size(file) for file in files]]
    self._where = f"{path}@{split}"

  def __len__(self) -> int:
    return len(self._records)

  def _parse(self, row: int) -> tuple[str, int, bytes]:
    try:
      record = self._records[row]
      magic, length, label = _RECORD.unpack_from(record)
      if magic != _RECORD_MAGIC:
        raise ValueError(f"record starts with {magic!r}")
      start = _RECORD.size + length
      return record[_RECORD.size : start].decode(), label, record[start:]
    except Exception as e:
      raise UnreadableImage(first_line(e)) from e

  def __getitem__(self, row: int) -> tuple[bytes, int]:
    _, label, data = self._parse(row)
    return data, label

  def name(self, row: int) -> str:
    try:
      return f"{self._where} record {row} ({self._parse(row)[0]})"
    except UnreadableImage:
      return f"{self._where} record {row}"

  def fingerprint(self) -> str:
    """SHA-256 of the index and of the files' sizes."""
    return hashlib.sha256(json.dumps(self._index, sort_keys=True).encode()).hexdigest()


def write_arrayrecord(
  source: ImageSource, path: str | os.PathLike, split: str, *, files: int | None = None
):
  """Copies a source, encoded bytes as they are, to PATH/SPLIT-*.array_record and PATH/SPLIT.json.

  The index is written last, so a split that was cut short does not exist.

  Args:
    files: into how many files; by default one per 10,000 images.

  Raises:
    UserError: the split exists, an image cannot be read, or the folder cannot be written.
  """
  path = storage.path(path)
  index_file = path / f"{split}.json"
  if index_file.exists():
    raise UserError(f"{index_file} exists; remove the split first or choose another name")
  n = len(source)
  files = files or -(-n // 10_000)
  names = [f"{split}-{i:05}-of-{files:05}.array_record" for i in range(files)]
  try:
    path.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(names):
      rows = range(i * n // files, (i + 1) * n // files)
      records.write(path / file, (_record(source, row) for row in rows))
    index = {
      "format": _INDEX_FORMAT,
      "images": n,
      "class_names": list(source.class_names),
      "files": names,
    }
    outputs.write_text(index_file, json.dumps(index, indent=1))
  except (OSError, UnreadableImage) as e:
    raise UserError(f"cannot write the images to {path}: {first_line(e)}") from e


def _record(source: ImageSource, row: int) -> bytes:
  data, label = source[row]
  name = os.path.basename(source.name(row)).encode(errors="replace")
  return _RECORD.pack(_RECORD_MAGIC, len(name), label) + name + data


def _open_embedded(path: str, split: str | None) -> ImageSource:
  if path:
    raise UserError(f"embedded takes a split and no path: embedded@{split or 'train'}")
  if not EMBEDDED_PHOTOS.is_dir():
    raise UserError(
      f"the embedded photos are not at {EMBEDDED_PHOTOS}: they come with a checkout of the"
      " repository, not with an installed package; name your own, for example folder:PATH@train"
    )
  if split is None:
    raise UserError(
      f"embedded needs a split, one of {', '.join(subfolders(EMBEDDED_PHOTOS))}: embedded@val"
    )
  return FolderSource(EMBEDDED_PHOTOS, split)


def _open_tfds(path: str, split: str | None) -> ImageSource:
  if not path or split is None:
    raise UserError("tfds: needs a dataset and a split, e.g. tfds:imagenet2012@validation")
  return TfdsSource(path, split)


_SCHEMES = {
  "folder": FolderSource,
  "parquet": ParquetSource,
  "webdataset": WebDatasetSource,
  "arrayrecord": ArrayRecordSource,
  "tfds": _open_tfds,
  "embedded": _open_embedded,
}
_WITH_PATH = ("folder", "parquet", "webdataset", "arrayrecord")


def _parse(spec: str) -> tuple[str, str, str | None]:
  """Scheme, path and split of a data spec; None for no split."""
  scheme, colon, rest = spec.partition(":")
  if not colon:
    scheme, at, split = spec.partition("@")
    return scheme, "", split if at else None
  path, at, split = rest.rpartition("@")
  whole = scheme in _WITH_PATH and os.path.exists(os.path.expanduser(rest))
  if not at or "/" in split or whole:
    return scheme, rest, None  # the @ is part of the path
  return scheme, path, split


def location(spec: str | os.PathLike) -> str | None:
  """The file or folder that a data spec or a plain path reads, if it is on this disk."""
  scheme, path, _ = _parse(os.fspath(spec))
  own = {"embedded": os.fspath(EMBEDDED_PHOTOS)}.get(scheme)
  candidates = (os.path.expanduser(p) for p in (os.fspath(spec), own or path) if p)
  return next(filter(os.path.exists, candidates), None)


def open_source(spec: str) -> ImageSource:
  """Opens the images that `spec` names; see the module's docstring for the forms.

  Raises:
    UserError: unknown form, missing path, unknown split (the message lists those there), nothing
      in it, or a package that is not installed.
  """
  scheme, path, split = _parse(spec)
  if scheme not in _SCHEMES:
    raise UserError(
      f"data spec {spec!r} is unknown; it must be folder:PATH@SPLIT, folder:PATH,"
      " parquet:PATH@SPLIT, webdataset:PATH@SPLIT, tfds:NAME@SPLIT, arrayrecord:PATH@SPLIT or"
      " embedded@SPLIT"
    )
  if split == "":
    raise UserError(f"data spec {spec!r} names no split after the @")
  if scheme in _WITH_PATH and not path:
    raise UserError(f"{scheme}: names no path; write {scheme}:PATH@train")
  return _SCHEMES[scheme](path, split)
