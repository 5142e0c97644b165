"""Measurements of many images, a part at a time, that survive a kill and are shared by processes.

A part is a folder of `.npy` files, a row for each image, and `part.json`. It appears when it is
whole. Its place is named by a hash of all that decides its numbers, so that parts of other settings
never mix and those that still hold are taken again.
"""

import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import tqdm

from coda_jax import outputs
from coda_jax.evaluation.rows import Rows

log = logging.getLogger("coda_jax")
FOLDER, _NOTES = "parts", "part.json"


@runtime_checkable
class ImageSet(Protocol):
  """Images by number, and what is measured of each.

  Attributes:
    name: for people; not every character becomes part of a file's name.
    count: how many there are.
    identity: JSON of all that decides the numbers.
  """

  name: str
  count: int
  identity: dict[str, Any]

  def measure(self, indices: range) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays [n, ...] by name, what else is to be kept, as JSON) of some of the images.

    `n` may be smaller than the number of indices, if images cannot be read; `index` says which
    are there.
    """
    ...


class Measured:
  """The parts of one set: arrays over all of its images, in order."""

  def __init__(self, folder: pathlib.Path, parts: Sequence[range]):
    self.folder, self._ranges = folder, parts
    self._parts = [folder / f"{i:05}" for i in range(len(parts))]

  def left(self) -> int:
    """Images of parts that are not there."""
    return sum(
      len(r) for r, part in zip(self._ranges, self._parts, strict=True) if not part.is_dir()
    )

  @property
  def names(self) -> list[str]:
    """Names of the arrays."""
    return sorted(p.stem for p in self._parts[0].glob("*.npy"))

  def rows(self, name: str) -> Rows:
    """An array of two axes, mapped."""
    return Rows([part / f"{name}.npy" for part in self._parts])

  def each(self, name: str) -> Iterator[np.ndarray]:
    """An array, part by part."""
    for part in self._parts:
      yield np.load(part / f"{name}.npy")

  def values(self, name: str) -> np.ndarray:
    """An array in memory."""
    return np.concatenate(list(self.each(name)))

  def notes(self, name: str) -> list:
    """What `part.json` of every part says of a name."""
    return [json.loads((part / _NOTES).read_text())[name] for part in self._parts]


class Progress:
  """Images done and the time left: a bar on a terminal, else a line now and then."""

  def __init__(self, total: int, seconds: float = 30.0):
    self._bar = tqdm.tqdm(total=total, unit="image", disable=None)
    self._total, self._done, self._computed = total, 0, 0
    self._start, self._told, self._seconds = time.monotonic(), time.monotonic(), seconds

  def add(self, images: int, what: str, computed: bool = True) -> None:
    """Counts images, those of other processes and earlier runs with `computed=False`."""
    self._done += images
    self._computed += images if computed else 0
    self._bar.set_description(what, refresh=False)
    self._bar.update(images)
    now = time.monotonic()
    if self._bar.disable and computed and now - self._told > self._seconds:
      self._told = now
      left = (now - self._start) / self._computed * (self._total - self._done)
      text = "%s: %d of %d images in all, %d:%02d min left at most"
      log.info(text, what, self._done, self._total, *divmod(round(left), 60))

  def close(self) -> None:
    self._bar.close()


def place(output: pathlib.Path, images: ImageSet, part: int) -> Measured:
  """Where the parts of a set are, `part` images in each."""
  text = json.dumps([images.identity, images.count, part], sort_keys=True)
  name = re.sub(r"[^\w=.-]+", "-", images.name)[:60]
  folder = output / FOLDER / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
  starts = range(0, images.count, part)
  return Measured(folder, [range(s, min(s + part, images.count)) for s in starts])


def measure_all(
  sets: Sequence[ImageSet], output: pathlib.Path, part: int, progress: Progress
) -> list[Measured]:
  """Measures what is missing of the sets; processes of one folder share the parts.

  Args:
    output: exists; parts lie in its folder `parts`.
    part: images of a part.
  """
  places = [place(output, s, part) for s in sets]
  tasks = [(s, m, i) for s, m in zip(sets, places, strict=True) for i in range(len(m._parts))]

  def do(number: int) -> None:
    images, measured, i = tasks[number]
    indices, folder = measured._ranges[i], measured._parts[i]
    if folder.is_dir():
      progress.add(len(indices), images.name, computed=False)
      return
    found, notes = images.measure(indices)
    _write(folder, found, notes)
    progress.add(len(indices), images.name)

  (output / FOLDER).mkdir(exist_ok=True)
  outputs.shared(output / FOLDER, range(len(tasks)), do, "parts")
  return places


def _write(folder: pathlib.Path, found: Mapping[str, np.ndarray], notes: Mapping[str, Any]) -> None:
  folder.parent.mkdir(exist_ok=True)
  aside = pathlib.Path(tempfile.mkdtemp(prefix=".part.", dir=folder.parent))
  try:
    for name, x in found.items():
      np.save(aside / f"{name}.npy", x)
    (aside / _NOTES).write_text(json.dumps(notes) + "\n")
    aside.chmod(0o755)
    os.rename(aside, folder)
  except BaseException:
    shutil.rmtree(aside, ignore_errors=True)
    raise


def clean(output: pathlib.Path) -> None:
  """Removes what processes that were killed left of parts; nobody else may write there."""
  for rest in (output / FOLDER).glob("*/.part.*"):
    shutil.rmtree(rest, ignore_errors=True)
