"""Image files in folders."""

import collections
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Collection, Iterator, Mapping

import numpy as np
from PIL import Image

from coda_jax import storage
from coda_jax.errors import UserError

_IMAGES = frozenset(
  ".jpg .jpeg .jpe .jif .jfif .mpo .jp2 .j2k .j2c .jpc .jpf .jpx .png .apng .webp .gif .bmp .dib"
  " .tif .tiff .pbm .pgm .ppm .pnm .tga .pcx .qoi .sgi".split()
)
_BY_PLUGIN = frozenset(".avif .avifs .heic .heif .hif .jxl".split())  # as Pillow was built
_NOT_READ = frozenset(
  ".svg .svgz .eps .ai .psd .psb .xcf .ico .icns .dds .exr .hdr .pfm .fits .dcm .raw .dng .cr2 .cr3"
  " .crw .nef .nrw .arw .srf .sr2 .orf .rw2 .raf .pef .srw .x3f .3fr .erf .kdc .mrw .iiq".split()
)
LOOK_LIKE_IMAGES = _BY_PLUGIN | _NOT_READ  # where they are skipped
_SYSTEM_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found"})
_TRAIN = ("train", "training")
SPLITS = (*_TRAIN, "val", "valid", "validation", "test", "testing")
METADATA = ("metadata.jsonl", "metadata.csv")  # captions, which `data.text` reads
_SHOWN = 3
ONLY_ON_DISK = (
  "images are read from a disk alone; mount the bucket, or copy the images by "
  "`coda_jax.data.sources.write_arrayrecord` and read arrayrecord:gs://BUCKET/FOLDER@SPLIT"
)


def image_extensions() -> frozenset[str]:
  """Endings of the files that count as images: what Pillow reads, with the plugins it has now."""
  return _IMAGES | (_BY_PLUGIN & Image.registered_extensions().keys())


def subfolders(folder: str | os.PathLike) -> list[str]:
  """Names of the folders in `folder` that are neither hidden nor a system's, sorted."""
  return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not _is_passed_over(e.name))


def _is_passed_over(name: str) -> bool:
  return name.startswith(".") or name in _SYSTEM_FOLDERS


def _extension(name: str) -> str:
  return os.path.splitext(name)[1].lower()


def files_below(
  folder: str, *, ordered: bool, seen: set[tuple[int, int]] | None = None
) -> Iterator[os.DirEntry[str]]:
  """All files in `folder` and below that are not hidden; `seen` guards against circular links."""
  seen = set() if seen is None else seen
  stat = os.stat(folder)
  if (stat.st_dev, stat.st_ino) in seen:
    return
  seen.add((stat.st_dev, stat.st_ino))
  with os.scandir(folder) as entries:
    for entry in sorted(entries, key=lambda e: e.name) if ordered else entries:
      if _is_passed_over(entry.name):
        continue
      if entry.is_dir():
        yield from files_below(entry.path, ordered=ordered, seen=seen)
      else:
        yield entry


def _classes_in(folder: pathlib.Path, names: Collection[str] | None = None) -> list[str]:
  """The subfolders, or those of `names`, that hold an image; looks no further than the first."""
  extensions = image_extensions()
  return [
    name
    for name in (subfolders(folder) if names is None else names)
    if any(_extension(e.name) in extensions for e in files_below(str(folder / name), ordered=False))
  ]


def few(names: Collection[str]) -> str:
  shown = ", ".join(list(names)[:_SHOWN])
  return f"{shown}, ... ({len(names)})" if len(names) > _SHOWN else shown


class FolderSource:
  """Image files in class folders, or in one flat folder (label -1).

  Rows are ordered by class and then by path. Class folders are those with images in them. Labels
  number the sorted class folders: those of train if the split has a `train` beside it, otherwise
  those of all splits that lie side by side. So a label means the same class in every split.

  Attributes:
    skipped: how many files of another kind there are, by their ending.

  Raises:
    UserError: the folder is missing, unreadable, or without images, its layout is ambiguous, it
      holds splits and none is named, or train lacks a class of the split.
  """

  def __init__(self, root: str | os.PathLike, split: str | None = None):
    root = storage.on_disk(root, ONLY_ON_DISK)
    if not root.is_dir():
      raise UserError(f"image folder {root} does not exist or is not a folder")
    try:
      if split is not None:
        if not (root / split).is_dir():
          there = ", ".join(subfolders(root)) or "none"
          raise UserError(f"image folder {root} has no split {split!r}; folders there: {there}")
        root = root / split
      self.root = str(root)
      self.skipped: Mapping[str, int] = {}
      files, labels = self._scan(root, split)
    except OSError as e:
      raise UserError(f"image folder {root} cannot be read: {e}") from e
    # One blob instead of a million strings: what each worker process gets is small.
    names = [os.fsencode(os.path.relpath(f, root)) for f in files]
    self._names = b"".join(names)
    self._ends = np.cumsum([len(n) for n in names], dtype="<i8")
    self._labels = np.asarray(labels, "<i4")

  def _scan(self, root: pathlib.Path, split: str | None) -> tuple[list[str], list[int]]:
    subs = subfolders(root)
    _check_no_splits(root, subs, split)
    extensions, skipped = image_extensions(), collections.Counter()

    def is_image(entry: os.DirEntry[str]) -> bool:
      extension = _extension(entry.name)
      if extension in extensions:
        return True
      plain = extension.isascii() and extension[1:].isalnum() and len(extension) <= 10
      skipped[extension if plain else "other"] += 1
      return False

    top = [e for e in os.scandir(root) if not e.is_dir() and not _is_passed_over(e.name)]
    top = [e for e in top if e.name not in METADATA]
    flat = sorted(e.path for e in top if is_image(e))
    by_class = {}
    for name in subs:
      files = [e.path for e in files_below(str(root / name), ordered=True) if is_image(e)]
      if files:
        by_class[name] = files
    self.skipped = dict(skipped.most_common())
    if flat and by_class:
      raise UserError(
        f"image folder {root} holds images ({os.path.basename(flat[0])}, ...) beside class folders"
        f" ({next(iter(by_class))}, ...); it must have one or the other"
      )
    if not flat and not by_class:
      there = ", ".join(f"{count} {extension}" for extension, count in self.skipped.items())
      raise UserError(
        f"image folder {root} holds no images ({' '.join(sorted(extensions))})"
        + (f", only other files: {there}" if there else "")
      )
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
    self.class_names = tuple(_class_names(root, split, by_class))
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

  def file_names(self) -> list[str]:
    """The images' paths below the folder."""
    bounds = itertools.pairwise([0, *self._ends.tolist()])
    return [os.fsdecode(self._names[start:end]) for start, end in bounds]

  def fingerprint(self) -> str:
    """SHA-256 of the classes, the files' names below the folder, and the labels."""
    found = hashlib.sha256(json.dumps(self.class_names).encode())
    for part in (self._names, self._ends.tobytes(), self._labels.tobytes()):
      found.update(part)
    return found.hexdigest()


def _check_no_splits(root: pathlib.Path, subs: list[str], split: str | None) -> None:
  """Raises UserError if `root` holds splits: two of them, or splits alone where none is named."""
  named = [s for known in SPLITS for s in subs if s.lower() == known]
  splits = _classes_in(root, named)
  others = [s for s in subs if s not in named]
  alone = split is None and splits and not _classes_in(root, others)
  if len(splits) > 1 or alone:
    raise UserError(
      f"image folder {root} holds splits {', '.join(splits)}; name one: folder:{root}@{splits[0]}"
    )


def _class_names(root: pathlib.Path, split: str | None, own: Collection[str]) -> list[str]:
  """What the labels of the split in `root`, whose class folders are `own`, number."""
  if split is None or split.lower() in _TRAIN:
    return sorted(own)
  beside = [root.parent / name for name in subfolders(root.parent) if name.lower() in SPLITS]
  for train in beside:
    if train.name.lower() in _TRAIN and (known := _classes_in(train)):
      if unknown := sorted({*own} - {*known}):
        raise UserError(
          f"image folder {root} has classes that {train} lacks: {few(unknown)}; those of"
          f" {train.name}: {few(known)}. Sort its images into folders of those names, or name a"
          " folder of images alone, which has no labels"
        )
      return known
  return sorted({*own}.union(*map(_classes_in, beside)))
