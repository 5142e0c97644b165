"""Checkpoints of the training state; the one place that knows orbax.

A checkpoint appears when it is complete (written aside, then renamed), so a process may be killed
at any moment and the disk may fill up: the last one stays readable. Saving runs in the background
while training goes on.
"""

import contextlib
import logging
import math
import os
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from jax.experimental import multihost_utils

from coda_jax import storage
from coda_jax.arrays import Arrays
from coda_jax.config import CheckpointSettings
from coda_jax.errors import UserError

log = logging.getLogger("coda_jax")

_training: Any = ocp.training  # its types say less than it takes


class Checkpoints:
  """The checkpoints of one run.

  Args:
    directory: is made if it is not there.
    settings: which are kept.
  """

  def __init__(self, directory: str | os.PathLike, settings: CheckpointSettings):
    self._kept = _Kept(settings)
    self.directory = storage.absolute(storage.path(directory))
    self._saving = None
    with self._readable_errors("open"):
      self._checkpointer = _training.Checkpointer(
        self.directory,
        save_decision_policy=_Always(),
        preservation_policy=self._kept,
        cleanup_tmp_directories=True,
      )

  @property
  def steps(self) -> list[int]:
    """Steps of the checkpoints that are there, ascending."""
    return [c.step for c in self._checkpointer.checkpoints]

  @property
  def latest(self) -> int | None:
    """Step of the last complete checkpoint."""
    return max(self.steps, default=None)

  def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
    """Tells the metrics of a step, by which the best checkpoints outlive later saves."""
    self._kept.evaluated(step, metrics)

  def save(self, step: int, state) -> None:
    """Starts saving `state` (a pytree of jax arrays); waits for the save before it, if any.

    The arrays may be donated as soon as this returns.

    Raises:
      UserError: this or the save before it failed.
    """
    self.wait()
    with self._readable_errors("save"):
      metadata = {"checksums": _checksums(state)}
      self._saving = self._checkpointer.save_async(step, state, custom_metadata=metadata)

  def wait(self) -> None:
    """Waits until the last save is complete. Raises UserError if it failed."""
    saving, self._saving = self._saving, None
    if saving is not None:
      with self._readable_errors("save"):
        saving.result()

  def restore(self, abstract_state) -> tuple[int, Any]:
    """(step, state) of the latest checkpoint that can be read.

    Later ones that cannot be read are renamed to `STEP.damaged`, with a warning.

    Args:
      abstract_state: its structure, `jax.ShapeDtypeStruct`s with the shardings to load into, which
        need not be those it was saved with.

    Raises:
      UserError: none can be read, or they are of another structure.
    """
    damaged, error = [], None
    for step in reversed(self.steps):
      state, good = None, True
      try:
        state = self._checkpointer.load(step, abstract_state)
        metadata = self._checkpointer.metadata(step).custom_metadata or {}
        kept = metadata.get("checksums")  # older versions kept none
        good = kept is None or kept == _checksums(state)
      except Exception as e:
        good, error = False, e
      # One process that cannot read it is enough.
      if all(np.ravel(multihost_utils.process_allgather(np.array(good)))):
        self._set_aside(damaged)
        return step, state
      damaged.append(step)
    raise UserError(
      f"the checkpoints {', '.join(map(str, damaged))} in {self.directory} are damaged or of "
      "another version (--debug shows the last error): restore one of these folders from a copy, "
      f"or remove {self.directory} to begin anew"
    ) from error

  def _set_aside(self, damaged: Collection[int]) -> None:
    """Renames damaged checkpoints, because their steps will be saved again."""
    for step in damaged:
      folder = self.directory / str(step)
      names = [f"{step}.damaged", *(f"{step}.damaged.{i}" for i in range(2, 100))]
      free = next(n for n in names if not (self.directory / n).exists())
      log.warning("%s is damaged: set aside as %s, the one before it is taken", folder, free)
      if jax.process_index() == 0:
        folder.rename(self.directory / free)
    if damaged:
      multihost_utils.sync_global_devices("damaged checkpoints are set aside")
      self._checkpointer.reload()

  def close(self) -> None:
    """Waits for the last save and stops the background threads."""
    try:
      self.wait()
    finally:
      with contextlib.suppress(Exception):  # a failure of the last save was raised by `wait`
        self._checkpointer.close()

  @contextlib.contextmanager
  def _readable_errors(self, verb: str):
    try:
      yield
    except (KeyboardInterrupt, SystemExit):
      raise
    except Exception as e:
      complete = [int(p.name) for p in self.directory.glob("*") if p.name.isdigit()]
      kept = f"; the last complete one is of step {max(complete)}" if complete else ""
      raise UserError(
        f"cannot {verb} a checkpoint in {self.directory}: {_first_line(e)}{kept}"
      ) from e


def read_averages(directory: str | os.PathLike, prefix: str) -> dict[int, Arrays]:
  """Averaged weights whose paths begin with `prefix`, by step, of every readable checkpoint.

  Only these arrays are read, onto the first device. There is nothing in a folder that is missing.
  """
  found, directory = {}, storage.absolute(storage.path(directory))
  if not directory.is_dir():
    return {}
  place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  with contextlib.closing(_training.Checkpointer(directory)) as checkpointer:
    for step in sorted(c.step for c in checkpointer.checkpoints):
      try:
        tree = checkpointer.metadata(step).metadata
        wanted = jax.tree.map(lambda _: ocp.PLACEHOLDER, tree)
        for name, x in tree["ema"].items():
          if name.startswith(prefix):
            wanted["ema"][name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        averages = checkpointer.load(step, wanted)["ema"]
        found[step] = {name: averages[name] for name in averages if name.startswith(prefix)}
      except Exception as e:  # damaged, or of another kind of run
        log.warning("%s/%d is left out: %s", directory, step, _first_line(e))
  return found


class _Kept:
  """Which checkpoints outlive a save: the latest, and the best of those that were evaluated."""

  def __init__(self, settings: CheckpointSettings):
    self._settings, self._scores = settings, {}

  def evaluated(self, step: int, metrics: Mapping[str, Any]) -> None:
    name = self._settings.best_metric
    value = metrics.get(name.removeprefix("-"))
    if value is not None and math.isfinite(value):
      self._scores[step] = -value if name.startswith("-") else value

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    del context
    steps = sorted(c.step for c in checkpoints)
    best = sorted((s for s in steps if s in self._scores), key=lambda s: -self._scores[s])
    kept = {*steps[-self._settings.keep :], *best[: self._settings.keep_best]}
    return [c.step in kept for c in checkpoints]


class _Always:
  """Save whenever asked: the loop decides when."""

  def should_save(self, step, previous_steps, *, context) -> bool:
    del step, previous_steps, context
    return True


def _checksums(state) -> dict[str, int]:
  """A number of each array's bits, by its path; the same on any devices."""
  leaves, _ = jax.tree.flatten_with_path(state)
  sums = jax.device_get(_weighted_sums([x for _, x in leaves]))
  return {jax.tree_util.keystr(p): int(s) for (p, _), s in zip(leaves, sums, strict=True)}


@jax.jit
def _weighted_sums(arrays: list[jax.Array]) -> list[jax.Array]:
  """Of each array, the sum of its elements' bits, each times an odd number of its position.

  Sums modulo 2^32 do not depend on their order: no device needs more than its part.
  """

  def of(x):
    if x.dtype == bool:
      x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    index = jnp.uint32(0)
    for axis, size in enumerate(x.shape):
      index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)

  return [of(x) for x in arrays]


def abstract(state, shardings):
  """`jax.ShapeDtypeStruct`s of `state` with `shardings`, for `Checkpoints.restore`."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
  )


def _first_line(e: BaseException) -> str:
  while e.__cause__ is not None and not str(e):
    e = e.__cause__
  if isinstance(e, OSError) and e.strerror:
    return e.strerror
  text = str(e) or type(e).__name__
  return " ".join(text.split())[:150]
