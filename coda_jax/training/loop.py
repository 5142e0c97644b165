"""The training loop: steps, checkpoints, records. A `Trainer` knows the networks and the data."""

import collections
import contextlib
import logging
import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from coda_jax import storage
from coda_jax.config import CheckpointSettings, LoggingSettings
from coda_jax.errors import UserError, describe
from coda_jax.evaluation.metrics import short_line
from coda_jax.outputs import write_text
from coda_jax.training.checkpoints import Checkpoints
from coda_jax.training.logging import Metrics, Progress
from coda_jax.training.preemption import Preemption, Stopped
from coda_jax.training.trainer import Trainer
from coda_jax.training.workdir import CHECKPOINTS, PARAMETERS

log = logging.getLogger("coda_jax")
_IN_FLIGHT = 2  # updates started ahead of the one that must have finished


def run(
  trainer: Trainer,
  workdir: str | os.PathLike,
  checkpoint: CheckpointSettings,
  logging_settings: LoggingSettings,
  config: Mapping,
  preemption: Preemption | None = None,
) -> bool:
  """Trains from the last checkpoint of `workdir`, or from the start, to the end.

  The result does not depend on interruptions: the state, the data and the random numbers of an
  update are functions of the config and of the update's number.

  A state is saved before it is evaluated, and the product is written before the last evaluation.
  An evaluation that fails is reported and the run goes on; only at the start it ends the run.

  Args:
    preemption: has been watching for signals; None watches from now on.

  Returns:
    True if the run is complete, False if SIGTERM or a preemption notice stopped it (saved).

  Raises:
    KeyboardInterrupt: Ctrl-C stopped it (saved).
    UserError: a metric is not finite, or a checkpoint cannot be saved or read.
  """
  workdir = storage.path(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(trainer.mesh))
    enter = lambda closable: stack.enter_context(contextlib.closing(closable))
    _check_best_metric(trainer, checkpoint)
    checkpoints = enter(Checkpoints(workdir / CHECKPOINTS, checkpoint))
    step = checkpoints.latest or 0
    if step > trainer.steps:
      raise UserError(f"{workdir} is at step {step}, past the {trainer.steps} steps of the config")
    if checkpoints.latest is None:
      state = trainer.initial_state()
    else:
      step, state = checkpoints.restore(trainer.abstract_state())
      log.info("continuing %s from step %d", workdir, step)
    summary, table = trainer.overview(state)
    log.info("%s", summary)
    if jax.process_index() == 0:
      write_text(workdir / PARAMETERS, table)
    metrics = enter(Metrics(workdir, logging_settings, step, config))
    progress = enter(Progress(step, trainer.steps, trainer.images_per_step))
    for record in metrics.records("eval"):
      checkpoints.evaluated(record["step"], record)
    preemption = preemption or stack.enter_context(Preemption())
    preemption.begin(checkpoints.wait)
    trainer.check = preemption.check
    window = _Window(checkpoints)
    saved = start = step

    def due(every: int) -> bool:
      return step == trainer.steps or (every > 0 and step % every == 0)

    def save() -> None:
      nonlocal saved
      if saved < step:
        window.check()  # a state that is not finite is never saved
        with progress.paused():
          checkpoints.save(step, state)
        saved = step
      preemption.may_leave = True

    def evaluate() -> bool:
      """Whether no signal ended the evaluation."""
      try:
        with progress.paused():
          values = trainer.evaluate(state)
      except Stopped:
        return False
      except Exception as e:
        if step == 0 or jax.process_count() > 1:
          raise
        log.error("step %d: the evaluation failed and is left out: %s", step, describe(e))
        return True
      metrics.write("eval", step, values)
      checkpoints.evaluated(step, values)
      if values:  # none without held-out data
        log.info("step %d  evaluation  %s", step, short_line(values))
      return True

    def stopped() -> bool:
      save()
      checkpoints.wait()
      log.info("stopped by a signal; saved step %d of %d", step, trainer.steps)
      if preemption.interrupted:
        raise KeyboardInterrupt
      return False

    # The file of the records is process 0's.
    done = {r["step"] for r in metrics.records("eval")}
    done = multihost_utils.broadcast_one_to_all(np.array(step in done))
    # Of the start, or of a checkpoint whose evaluation was cut off.
    if due(trainer.eval_every) and step < trainer.steps and not done and not evaluate():
      return stopped()
    batches = enter(trainer.batches(step)) if step < trainer.steps else iter(())
    try:
      while step < trainer.steps:
        batch = next(batches)
        with jax.transfer_guard("disallow"):
          state, values = trainer.step(state, batch)
        step += 1
        window.add(step, values)
        progress.advance(values)  # waits for the first update, which compiles: no loss until then
        preemption.may_leave = False
        stop = preemption.requested()
        if due(logging_settings.every):
          record = window.mean()
          record |= progress.report(step, {k: record[k] for k in trainer.shown if k in record})
          metrics.write("train", step, record)
        evaluating = due(trainer.eval_every) and not stop and step < trainer.steps
        if due(checkpoint.every) or stop or (evaluating and checkpoint.keep_best):
          save()
        if stop or (evaluating and not evaluate()):
          return stopped()
    except Exception:
      # Data or a disk failed, not the state: what was done since the last save is kept. Several
      # processes can only save together, and the others know of nothing.
      usable = not any(x.is_deleted() for x in jax.tree.leaves(state))
      if saved < step and usable and jax.process_count() == 1:
        with contextlib.suppress(Exception):
          save()
          checkpoints.wait()
          log.info("saved step %d of %d", step, trainer.steps)
      raise
    checkpoints.wait()
    preemption.may_leave = False  # or a part of the product would stay
    trainer.export(state, workdir)
    preemption.may_leave = True
    if not (done and start == step) and not evaluate():
      return stopped()
    return True


def _check_best_metric(trainer: Trainer, settings: CheckpointSettings) -> None:
  """Raises UserError if `trainer` evaluates, but not what the best checkpoints are chosen by."""
  measured, metric = trainer.metric_names(), settings.best_metric.removeprefix("-")
  if settings.keep_best and measured and metric not in measured:
    raise UserError(
      f"config.checkpoint.best_metric={settings.best_metric!r}: the evaluation does not measure "
      f"{metric!r}; it measures {', '.join(measured)}"
    )


class _Window:
  """Metrics of the updates since the last record. They stay on the device until they are needed."""

  def __init__(self, checkpoints: Checkpoints):
    self._checkpoints = checkpoints
    self._pending: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()
    self._fetched: list[Mapping[str, np.ndarray]] = []
    self._error: UserError | None = None

  def add(self, step: int, values: Mapping[str, jax.Array]) -> None:
    """Metrics of an update that was started; waits for earlier ones if too many are unfinished."""
    self._pending.append((step, values))
    if len(self._pending) > _IN_FLIGHT:
      jax.block_until_ready(self._pending[-_IN_FLIGHT - 1][1])

  def check(self) -> None:
    """Fetches what is pending. Raises UserError naming the first step and metrics not finite."""
    if self._error is not None:
      raise self._error
    steps, pending = zip(*self._pending, strict=True) if self._pending else ((), ())
    self._pending.clear()
    for step, values in zip(steps, jax.device_get(pending), strict=True):
      bad = [name for name, x in values.items() if not np.all(np.isfinite(x))]
      if bad:
        self._checkpoints.wait()
        kept = self._checkpoints.latest
        saved = "nothing was saved" if kept is None else f"the checkpoint of step {kept} is intact"
        self._error = UserError(f"step {step}: {', '.join(bad)} not finite; {saved}")
        raise self._error
      self._fetched.append(values)

  def mean(self) -> dict[str, float | np.ndarray]:
    """Mean of each metric over the updates since the last call."""
    self.check()
    fetched, self._fetched = self._fetched, []
    return {k: np.mean([v[k] for v in fetched], axis=0, dtype=np.float64) for k in fetched[0]}
