"""Image files in folders."""

import os
import pathlib

import numpy as np

from coda_jax.errors import UserError

IMAGE_EXTENSIONS = frozenset(
  ".jpg .jpeg .png .webp .bmp .gif .tif .tiff .ppm .pgm .jp2 .avif".split()
)
_SPLITS = ("train", "val", "validation", "test")


def subfolders(folder: pathlib.Path) -> list[str]:
  """Names of the folders in `folder` that are not hidden, sorted."""
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
        there = ", ".join(subfolders(root)) or "none"
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
    by_class = {name: _images_below(str(root / name), set()) for name in subfolders(root)}
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
      names.update(*(subfolders(s) for s in siblings if s.is_dir()))
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
