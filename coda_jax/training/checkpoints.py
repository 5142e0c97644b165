"""Checkpoints of the training state; the one place that knows orbax.

A checkpoint appears when it is complete (written aside, then renamed), so a process may be killed
at any moment and the disk may fill up: the last one stays readable. Saving runs in the background
while training goes on.
"""

import contextlib
import os
import pathlib
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from coda_jax.config import CheckpointSettings
from coda_jax.errors import UserError

_training: Any = ocp.training  # its types say less than it takes


class Checkpoints:
  """The checkpoints of one run.

  Args:
    directory: is made if it is not there.
    settings: which are kept.
  """

  def __init__(self, directory: str | os.PathLike, settings: CheckpointSettings):
    policies = _training.preservation_policies
    keep = [policies.LatestN(settings.keep)]
    if settings.keep_best:
      name = settings.best_metric.removeprefix("-")
      sign = -1 if settings.best_metric.startswith("-") else 1
      keep.append(
        policies.BestN(
          get_metric_fn=lambda metrics: sign * metrics[name],
          n=settings.keep_best,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._metric = settings.best_metric.removeprefix("-")
    self.directory = pathlib.Path(directory).absolute()
    with self._readable_errors("open"):
      self._checkpointer = _training.Checkpointer(
        self.directory,
        save_decision_policy=_Always(),
        preservation_policy=policies.AnyPreservationPolicy(keep),
        cleanup_tmp_directories=True,
      )
    self._saving = None

  @property
  def steps(self) -> list[int]:
    """Steps of the checkpoints that are there, ascending."""
    return [c.step for c in self._checkpointer.checkpoints]

  @property
  def latest(self) -> int | None:
    """Step of the last complete checkpoint."""
    return max(self.steps, default=None)

  def save(self, step: int, state, metrics: dict[str, float] | None = None) -> None:
    """Starts saving `state` (a pytree of jax arrays); waits for the save before it, if any.

    The arrays may be donated as soon as this returns.

    Args:
      metrics: of an evaluation of this state, by which the best checkpoints are kept.

    Raises:
      UserError: this or the save before it failed.
    """
    self.wait()
    if metrics and self._metric not in metrics:
      raise UserError(
        f"config.checkpoint.best_metric names {self._metric!r}, which the evaluation does not "
        f"measure; it measures {', '.join(metrics)}"
      )
    metrics = metrics and {self._metric: metrics[self._metric]}
    with self._readable_errors("save"):
      self._saving = self._checkpointer.save_async(step, state, metrics=metrics)

  def wait(self) -> None:
    """Waits until the last save is complete. Raises UserError if it failed."""
    saving, self._saving = self._saving, None
    if saving is not None:
      with self._readable_errors("save"):
        saving.result()

  def restore(self, abstract_state, step: int | None = None):
    """The state saved at `step`, the latest by default.

    Args:
      abstract_state: its structure, `jax.ShapeDtypeStruct`s with the shardings to load into, which
        need not be those it was saved with.

    Raises:
      UserError: it cannot be read, or is of another structure.
    """
    with self._readable_errors("read"):
      return self._checkpointer.load(step, abstract_state)

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
      good = getattr(self, "_checkpointer", None) and self._last_good()
      kept = f"; the checkpoint of step {good} is intact" if good is not None else ""
      raise UserError(
        f"cannot {verb} a checkpoint in {self.directory}: {_first_line(e)}{kept}"
      ) from e

  def _last_good(self) -> int | None:
    names = [p.name for p in self.directory.iterdir() if p.name.isdigit()]
    return max(map(int, names), default=None)


class _Always:
  """Save whenever asked: the loop decides when."""

  def should_save(self, step, previous_steps, *, context) -> bool:
    del step, previous_steps, context
    return True


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
  return " ".join(text.split())[:300]
