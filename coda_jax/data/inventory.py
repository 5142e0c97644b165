"""What a run found in its data, and whether a later run finds the same."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from coda_jax import outputs, storage
from coda_jax.data.folder import LOOK_LIKE_IMAGES
from coda_jax.errors import UserError

log = logging.getLogger("coda_jax")

_SHOWN = 5  # endings of skipped files


@runtime_checkable
class Source(Protocol):
  """What `describe` needs of a source of images or of tokens."""

  @property
  def class_names(self) -> Sequence[str]: ...

  @property
  def skipped(self) -> Mapping[str, int]: ...

  def __len__(self) -> int: ...

  def fingerprint(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Inventory:
  """What a data spec names.

  Attributes:
    spec: the data spec, or the directory of tokens.
    images: how many.
    classes: 0 where there are no labels.
    skipped: how many files are not read, by their ending.
    fingerprint: equal for equal lists of images, wherever they lie.
  """

  spec: str
  images: int
  classes: int
  skipped: Mapping[str, int]
  fingerprint: str

  def line(self) -> str:
    """One line, such as `folder:x@train: 1,234 images in 10 classes; skipped 1 file (.txt 1)`."""
    classes = f"in {_count(self.classes, 'class', 'classes')}" if self.classes else "without labels"
    line = f"{self.spec}: {_count(self.images, 'image')} {classes}"
    if self.skipped:
      kinds = [f"{ending} {n:,}" for ending, n in self.skipped.items()]
      shown = ", ".join(kinds[:_SHOWN] + ["..."] * (len(kinds) > _SHOWN))
      line += f"; skipped {_count(sum(self.skipped.values()), 'file')} ({shown})"
    if self.unread_images:
      line += f"; convert {', '.join(self.unread_images)} to have them read"
    return line

  @property
  def unread_images(self) -> list[str]:
    """Endings of skipped files that look like images."""
    return [ending for ending in self.skipped if ending in LOOK_LIKE_IMAGES]

  def log(self, key: str = "") -> None:
    """Logs the line, after the config's key; as a warning if what looks like images is skipped."""
    level = logging.WARNING if self.unread_images else logging.INFO
    log.log(level, "%s", f"{key} {self.line()}".strip())


def _count(n: int, one: str, many: str = "") -> str:
  return f"{n:,} {one if n == 1 else many or one + 's'}"


def describe(source: Source, spec: str) -> Inventory:
  """What `source`, which `spec` opened, holds."""
  return Inventory(
    spec, len(source), len(source.class_names), dict(source.skipped), source.fingerprint()
  )


def check_unchanged(file: storage.Path, found: Mapping[str, Inventory], accept: bool) -> None:
  """Checks that the data are those that `write` noted. Without the file there is nothing to check.

  Args:
    file: what `write` wrote.
    found: the data, by the config's key.
    accept: goes on with other data, with a warning for each.

  Raises:
    UserError: images were added or removed, or the file is malformed.
  """
  try:
    noted = json.loads(file.read_text())
    then = {key: (e["spec"], int(e["images"]), e["fingerprint"]) for key, e in noted.items()}
  except FileNotFoundError:
    return
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
    raise UserError(
      f"{file}, which says what the run's data were, cannot be read ({e}); restore it, or remove it"
      " to go on with the data as they are"
    ) from e
  changed = []
  for key, now in found.items():
    if key in then and then[key][2] != now.fingerprint:
      spec, images, _ = then[key]
      where = now.spec if now.spec == spec else f"{now.spec} ({spec} then)"
      counts = f"{images:,} images then and {now.images:,} now"
      if images == now.images:
        counts += ", with other names or labels"
      changed.append(f"{key} {where}: {counts}")
  if changed and not accept:
    raise UserError(
      f"the data are not those that the run began with: {'; '.join(changed)}. Restore the images,"
      " or go on with the data as they are by --accept-changed-data"
    )
  for change in changed:
    log.warning("going on with changed data: %s", change)


def check_same(found: Mapping[str, Inventory], first: Mapping[str, Mapping]) -> None:
  """Checks that this host sees the data that process 0 sees.

  Args:
    found: the data here, by the config's key.
    first: the same of process 0, as JSON.

  Raises:
    UserError: this host sees others.
  """
  for key, here in found.items():
    there = first[key]
    if here.fingerprint != there["fingerprint"]:
      raise UserError(
        f"{key} {here.spec}: {here.images:,} images here and {there['images']:,} on process "
        "0, or others; every host must see the same data: a shared folder, or a full copy on each"
      )


def write(file: storage.Path, found: Mapping[str, Inventory]) -> None:
  """Notes the data, by the config's key, for `check_unchanged`."""
  keys = ("spec", "images", "classes", "fingerprint")
  noted = {key: {k: getattr(data, k) for k in keys} for key, data in found.items()}
  outputs.write_text(file, json.dumps(noted, indent=1) + "\n")
