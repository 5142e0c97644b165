"""Which files of a dataset in shards belong to a split, by their folders and names.

Known are `train-00000-of-00294.parquet`, `data/train-0000.tar`, `imagenet-train-000.tar`,
`train/0000.parquet`, `train.parquet`, and plain `0000.tar` for a dataset without splits.
"""

import logging
import os
import pathlib
import re
from typing import NamedTuple

from coda_jax.data.folder import SPLITS, few, files_below
from coda_jax.errors import UserError

log = logging.getLogger("coda_jax")

# Hugging Face's older files end with a hash behind the count.
_NUMBERED = re.compile(
  r"(?:(?P<base>.+?)[-_.])?(?P<number>\d+)(?:-of-(?P<of>\d+))?(?:-[0-9a-f]{16})?"
)


class _Shard(NamedTuple):
  """A file: its folder below the dataset's, its name without the number, the number and count."""

  folder: str
  base: str
  number: int
  of: int
  path: pathlib.Path

  @property
  def words(self) -> set[str]:
    """What may name its split."""
    parts = [*self.folder.split(os.sep), self.base]
    return {word for part in parts for word in (part, *re.split(r"[-_.]", part))}


def stat(file: str | os.PathLike) -> tuple[int, int]:
  """Bytes and time of change (ns), by which a changed file is noticed."""
  found = os.stat(file)
  return found.st_size, found.st_mtime_ns


def find(root: pathlib.Path, split: str | None, ending: str) -> list[pathlib.Path]:
  """The files of a split in their order, or all files of a dataset without splits.

  A warning tells which numbers are missing.

  Args:
    root: the dataset's folder, or one file.
    ending: of the files, such as ".tar".

  Raises:
    UserError: nothing there, an unknown split, no split where there are some, the split in several
      places, or a file that is a Git LFS pointer.
  """
  if root.is_file():
    if split is not None:
      raise UserError(f"{root} is one file, which has no splits; leave out @{split}")
    _check_no_pointer(root)
    return [root]
  shards, known = _all(root, ending), splits(root, ending)
  if split is not None:
    found = [s for s in shards if split in s.words]
    if not found:
      there = ", ".join(known) or few([s.path.name for s in shards])
      raise UserError(f"{root} has no split {split!r} in {ending} files; there: {there}")
  else:
    found = shards
    if len(known) > 1:
      raise UserError(
        f"{root} holds splits {', '.join(known)}; name one: {root}@{next(iter(known))}"
      )
  places = {(s.folder, s.base if s.number >= 0 else "") for s in found}
  if len(places) > 1:
    names = few([os.path.join(*place).rstrip(os.sep) for place in sorted(places)])
    raise UserError(f"{root} holds several sets of {ending} files: {names}; name the folder of one")
  _warn_of_gaps(root, found)
  for shard in found:
    _check_no_pointer(shard.path)
  return [s.path for s in found]


def splits(root: pathlib.Path, ending: str) -> dict[str, list[pathlib.Path]]:
  """The files of every split that goes by a usual name."""
  shards = [] if root.is_file() else _all(root, ending)
  names = sorted({w for s in shards for w in s.words if w.lower() in SPLITS})
  return {name: [s.path for s in shards if name in s.words] for name in names}


def _all(root: pathlib.Path, ending: str) -> list[_Shard]:
  """Every file with the ending below `root`, in order. Raises UserError if there is none."""
  if not root.is_dir():
    raise UserError(f"{root}: no such folder or file")
  found = []
  try:
    for entry in files_below(str(root), ordered=True):
      if entry.name.endswith(ending):
        path = pathlib.Path(entry.path)
        match = _NUMBERED.fullmatch(entry.name.removesuffix(ending))
        base = (match["base"] or "") if match else entry.name.removesuffix(ending)
        number, of = (int(match[k] or 0) for k in ("number", "of")) if match else (-1, 0)
        found.append(_Shard(os.path.relpath(path.parent, root), base, number, of, path))
  except OSError as e:
    raise UserError(f"{root} cannot be read: {e}") from e
  if not found:
    raise UserError(f"{root} holds no {ending} files")
  return sorted(found)


def _warn_of_gaps(root: pathlib.Path, shards: list[_Shard]) -> None:
  numbers = {s.number for s in shards if s.number >= 0}
  if not numbers:
    return
  promised = range(max(s.of for s in shards)) or range(min(numbers), max(numbers) + 1)
  if missing := sorted(set(promised) - numbers):
    names, count = few([str(n) for n in missing]), len(promised)
    log.warning("%s: %d of %d shards are not there: %s", root, len(missing), count, names)


def _check_no_pointer(path: pathlib.Path) -> None:
  try:
    with path.open("rb") as f:
      head = f.read(40)
  except OSError as e:
    raise UserError(f"{path} cannot be read: {e.strerror}") from e
  if head.startswith(b"version https://git-lfs"):
    raise UserError(f"{path} is a Git LFS pointer, not the data; fetch it with `git lfs pull`")
