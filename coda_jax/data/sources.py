"""Where images come from: random access to encoded images and labels, chosen by a spec.

A source has `len()`, `source[i]` -> (encoded bytes, label), `class_names`, and `name(i)`, which
tells a person which image row i is. Sources hold no open files until read and can be pickled, so
that worker processes get a copy.

  folder:PATH@train           PATH/train/<class>/*.jpg
  folder:PATH                 PATH/*.jpg (no labels: -1) or PATH/<class>/*.jpg
  tfds:NAME@validation        a TFDS dataset prepared as array_record, or the folder it lies in
  arrayrecord:PATH@train      what `write_arrayrecord` made
  embedded@val                the photos in the repository's assets/photos/val
"""

import json
import os
import pathlib
import struct
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from coda_jax.data.decode import UnreadableImage
from coda_jax.errors import UserError

IMAGE_EXTENSIONS = frozenset(
  ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .avif".split()
)
_SPLITS = ("train", "val", "validation", "test")
EMBEDDED_PHOTOS = pathlib.Path(__file__).parents[2] / "assets" / "photos"


@runtime_checkable
class ImageSource(Protocol):
  """Random access to encoded images. Rows never change order while a run lasts."""

  class_names: Sequence[str]  # empty when the images have no labels (label -1)

  def __len__(self) -> int: ...

  def __getitem__(self, row: int) -> tuple[bytes, int]:
    """Encoded bytes and label; raises OSError or UnreadableImage if they cannot be had."""
    ...

  def name(self, row: int) -> str: ...


def _subfolders(folder: pathlib.Path) -> list[str]:
  return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _is_image(name: str) -> bool:
  return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS


def _images_below(folder: str, seen: set[tuple[int, int]]) -> list[str]:
  """Paths of all images in `folder` and below, sorted; `seen` guards against circular links."""
  stat = os.stat(folder)
  if (stat.st_dev, stat.st_ino) in seen:
    return []
  seen.add((stat.st_dev, stat.st_ino))
  found = []
  for entry in sorted(os.scandir(folder), key=lambda e: e.name):
    if entry.name.startswith("."):
      continue
    if entry.is_dir():
      found += _images_below(entry.path, seen)
    elif _is_image(entry.name):
      found.append(entry.path)
  return found


class FolderSource:
  """Image files in class folders, or in one flat folder (label -1).

  Rows are ordered by class and then by path. Labels number the sorted class folders: those of all
  of train, val, validation and test that lie side by side, so that a label means the same class in
  every split.

  Raises:
    UserError: the folder is missing, unreadable, or without images, or its layout is ambiguous.
  """

  def __init__(self, root: str | os.PathLike, split: str | None = None):
    root = pathlib.Path(root).expanduser()
    if not root.is_dir():
      raise UserError(f"image folder {root} does not exist or is not a folder")
    if split is not None:
      if not (root / split).is_dir():
        there = ", ".join(_subfolders(root)) or "none"
        raise UserError(f"image folder {root} has no split {split!r}; folders there: {there}")
      root = root / split
    self.root = str(root)
    try:
      files, labels = self._scan(root, split)
    except OSError as e:
      raise UserError(f"image folder {root} cannot be read: {e}") from e
    # One blob instead of a million strings: what each worker process gets is small.
    names = [os.fsencode(os.path.relpath(f, root)) for f in files]
    self._names = b"".join(names)
    self._ends = np.cumsum([len(n) for n in names])
    self._labels = np.asarray(labels, np.int32)

  def _scan(self, root: pathlib.Path, split: str | None) -> tuple[list[str], list[int]]:
    flat = sorted(e.path for e in os.scandir(root) if _is_image(e.name) and not e.is_dir())
    by_class = {name: _images_below(str(root / name), set()) for name in _subfolders(root)}
    by_class = {name: files for name, files in by_class.items() if files}
    if flat and by_class:
      raise UserError(
        f"image folder {root} holds images ({os.path.basename(flat[0])}, ...) beside class folders"
        f" ({next(iter(by_class))}, ...); it must have one or the other"
      )
    if not flat and not by_class:
      raise UserError(f"image folder {root} holds no images ({' '.join(sorted(IMAGE_EXTENSIONS))})")
    if flat:
      self.class_names = ()
      return flat, [-1] * len(flat)
    if split is None and all(
      os.path.dirname(f) != str(root / name) for name, files in by_class.items() for f in files
    ):
      splits = ", ".join(by_class)
      raise UserError(
        f"image folder {root} has its images two levels down; name the split, one of {splits}:"
        f" folder:{root}@{next(iter(by_class))}"
      )
    names = set(by_class)
    if split is not None:  # a class that one split lacks must not renumber that split's labels
      siblings = [root.parent / name for name in _SPLITS]
      names.update(*(_subfolders(s) for s in siblings if s.is_dir()))
    self.class_names = tuple(sorted(names))
    label = {name: i for i, name in enumerate(self.class_names)}
    files = [f for files in by_class.values() for f in files]
    return files, [label[name] for name, files in by_class.items() for _ in files]

  def __len__(self) -> int:
    return len(self._ends)

  def name(self, row: int) -> str:
    start = self._ends[row - 1] if row else 0
    return os.path.join(self.root, os.fsdecode(self._names[start : self._ends[row]]))

  def __getitem__(self, row: int) -> tuple[bytes, int]:
    with open(self.name(row), "rb") as f:
      return f.read(), int(self._labels[row])


def _import_array_record():
  try:
    from array_record.python import array_record_data_source, array_record_module
  except ImportError as e:
    raise UserError(
      "arrayrecord: needs the package array-record, which exists for Linux alone"
    ) from e
  return array_record_module.ArrayRecordWriter, array_record_data_source.ArrayRecordDataSource


# One record: this header, the image's name in UTF-8, the encoded image up to the end.
_RECORD = struct.Struct("<4sHi")  # magic, length of the name in bytes, label
_RECORD_MAGIC = b"CJI1"
_INDEX_FORMAT = "coda_jax images 1"


class ArrayRecordSource:
  """Images in ArrayRecord files: PATH/SPLIT.json lists the files, the classes and the count.

  A record is the bytes "CJI1", then little-endian the name's length (uint16) and the label
  (int32), then the name in UTF-8, then the encoded image.

  Raises:
    UserError: missing path, unknown split, a file missing or not whole, no images.
  """

  def __init__(self, path: str | os.PathLike, split: str | None = None):
    _, data_source = _import_array_record()
    path = pathlib.Path(path).expanduser()
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
      raise UserError(f"{index_file} is no list of ArrayRecord images ({e})") from e
    if missing := [str(f) for f in files if not f.is_file()]:
      raise UserError(f"{index_file} lists files that do not exist: {', '.join(missing)}")
    try:
      self._records = data_source([str(f) for f in files])
    except Exception as e:  # array_record raises bare types on damaged files
      raise UserError(f"ArrayRecord files of {index_file} cannot be read: {_line(e)}") from e
    if len(self._records) != count or not count:
      raise UserError(f"{index_file} promises {count} images, its files hold {len(self._records)}")
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
      raise UnreadableImage(_line(e)) from e

  def __getitem__(self, row: int) -> tuple[bytes, int]:
    _, label, data = self._parse(row)
    return data, label

  def name(self, row: int) -> str:
    try:
      return f"{self._where} record {row} ({self._parse(row)[0]})"
    except UnreadableImage:
      return f"{self._where} record {row}"


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
  writer_type, _ = _import_array_record()
  path = pathlib.Path(path).expanduser()
  index_file = path / f"{split}.json"
  if index_file.exists():
    raise UserError(f"{index_file} exists; remove the split first or choose another name")
  n = len(source)
  files = files or -(-n // 10_000)
  names = [f"{split}-{i:05}-of-{files:05}.array_record" for i in range(files)]
  try:
    path.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(names):
      writer = writer_type(str(path / file), "group_size:1")  # random access record by record
      for row in range(i * n // files, (i + 1) * n // files):
        data, label = source[row]
        name = os.path.basename(source.name(row)).encode(errors="replace")
        writer.write(_RECORD.pack(_RECORD_MAGIC, len(name), label) + name + data)
      writer.close()
    index = {
      "format": _INDEX_FORMAT,
      "images": n,
      "class_names": list(source.class_names),
      "files": names,
    }
    scratch = index_file.with_suffix(".json.partial")
    scratch.write_text(json.dumps(index, indent=1))
    scratch.rename(index_file)
  except (OSError, UnreadableImage) as e:
    raise UserError(f"cannot write the images to {path}: {_line(e)}") from e


class TfdsSource:
  """A prepared TFDS dataset with the features `image` and, for labels, `label`.

  Read through `tfds.data_source`, without TensorFlow; images come encoded, as stored.

  Raises:
    UserError: tensorflow-datasets is not installed, unknown dataset or split, not prepared as
      array_record, or no images in it.
  """

  def __init__(self, name: str, split: str):
    try:
      import tensorflow_datasets as tfds
    except ImportError as e:
      raise UserError(
        "tfds: needs tensorflow-datasets, the extra 'tfds': pip install 'coda_jax[tfds]'"
      ) from e
    decoders = {"image": tfds.decode.SkipDecoding()}
    try:
      if os.path.isfile(os.path.join(name, "dataset_info.json")):
        builder = tfds.builder_from_directory(name)
        self._examples = builder.as_data_source(split=split, decoders=decoders)
      else:
        self._examples = tfds.data_source(name, split=split, download=False, decoders=decoders)
    except Exception as e:  # tfds raises all sorts
      raise UserError(
        f"cannot open tfds:{name}@{split}: {_line(e)} (prepare it with `tfds build"
        f" {name} --file_format=array_record`; TFDS_DATA_DIR says where datasets lie)"
      ) from e
    features = self._examples.dataset_info.features
    if "image" not in features:
      raise UserError(f"tfds:{name} has no feature 'image', only {', '.join(features)}")
    if not len(self._examples):
      raise UserError(f"tfds:{name}@{split} holds no images")
    self.class_names = tuple(
      getattr(features["label"], "names", None) or () if "label" in features else ()
    )
    self._where = f"tfds:{name}@{split}"

  def __len__(self) -> int:
    return len(self._examples)

  def __getitem__(self, row: int) -> tuple[bytes, int]:
    try:
      example = self._examples[row]
    except Exception as e:
      raise UnreadableImage(_line(e)) from e
    return example["image"], int(example["label"]) if self.class_names else -1

  def name(self, row: int) -> str:
    try:
      file = self._examples[row]["file_name"]
    except Exception:  # the record is damaged, or the dataset does not keep names
      return f"{self._where} row {row}"
    return f"{self._where} row {row} ({file.decode(errors='replace')})"


def _line(e: Exception) -> str:
  """The first line of an exception's message, or its type when it has none."""
  message = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
  return next(iter(message.splitlines()), "") or type(e).__name__


def _open_embedded(path: str, split: str | None) -> ImageSource:
  if path:
    raise UserError(f"embedded takes a split and no path: embedded@{split or 'train'}")
  if not EMBEDDED_PHOTOS.is_dir():
    raise UserError(
      f"the embedded photos are not at {EMBEDDED_PHOTOS}: they come with a checkout of the"
      " repository, not with an installed package"
    )
  if split is None:
    raise UserError(
      f"embedded needs a split, one of {', '.join(_subfolders(EMBEDDED_PHOTOS))}: embedded@val"
    )
  return FolderSource(EMBEDDED_PHOTOS, split)


def _open_folder(path: str, split: str | None) -> ImageSource:
  if not path:
    raise UserError("folder: names no path; write folder:PATH@train or folder:PATH")
  return FolderSource(path, split)


def _open_tfds(path: str, split: str | None) -> ImageSource:
  if not path or split is None:
    raise UserError("tfds: needs a dataset and a split, e.g. tfds:imagenet2012@validation")
  return TfdsSource(path, split)


def _open_arrayrecord(path: str, split: str | None) -> ImageSource:
  if not path:
    raise UserError("arrayrecord: names no path; write arrayrecord:PATH@train")
  return ArrayRecordSource(path, split)


_SCHEMES = {
  "folder": _open_folder,
  "tfds": _open_tfds,
  "arrayrecord": _open_arrayrecord,
  "embedded": _open_embedded,
}


def open_source(spec: str) -> ImageSource:
  """Opens the images that `spec` names; see the module's docstring for the forms.

  Raises:
    UserError: unknown form, missing path, unknown split (the message lists those there), nothing
      in it, or a package that is not installed.
  """
  scheme, colon, rest = spec.partition(":")
  if not colon:
    scheme, at, split = spec.partition("@")
    path = ""
  else:
    path, at, split = rest.rpartition("@")
    if not at or "/" in split or (scheme == "folder" and os.path.isdir(rest)):
      path, at, split = rest, "", ""  # the @ is part of the path
  if scheme not in _SCHEMES:
    raise UserError(
      f"data spec {spec!r} is unknown; it must be folder:PATH@SPLIT, folder:PATH,"
      " tfds:NAME@SPLIT, arrayrecord:PATH@SPLIT or embedded@SPLIT"
    )
  if at and not split:
    raise UserError(f"data spec {spec!r} names no split after the @")
  return _SCHEMES[scheme](path, split if at else None)
