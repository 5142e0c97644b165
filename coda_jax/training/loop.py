"""The training loop: steps, checkpoints, records. A `Trainer` knows the networks and the data."""

import collections
import contextlib
import logging
import os
import pathlib
import signal
import threading
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from coda_jax.config import CheckpointSettings, LoggingSettings
from coda_jax.errors import UserError
from coda_jax.evaluation.metrics import short_line
from coda_jax.outputs import write_text
from coda_jax.training.checkpoints import Checkpoints
from coda_jax.training.logging import Metrics, Progress
from coda_jax.training.trainer import Trainer

log = logging.getLogger("coda_jax")
PARAMETERS_FILE = "parameters.txt"
_IN_FLIGHT = 2  # updates started ahead of the one that must have finished


def run(
  trainer: Trainer,
  workdir: str | os.PathLike,
  checkpoint: CheckpointSettings,
  logging_settings: LoggingSettings,
  config: Mapping,
) -> bool:
  """Trains from the last checkpoint of `workdir`, or from the start, to the end.

  The result does not depend on interruptions: the state, the data and the random numbers of an
  update are functions of the config and of the update's number.

  Returns:
    True if the run is complete, False if SIGTERM or a preemption notice stopped it (saved).

  Raises:
    UserError: a metric is not finite, or a checkpoint cannot be saved or read.
  """
  workdir = pathlib.Path(workdir)
  with contextlib.ExitStack() as stack:
    stack.enter_context(jax.set_mesh(trainer.mesh))
    enter = lambda closable: stack.enter_context(contextlib.closing(closable))
    checkpoints = enter(Checkpoints(workdir / "checkpoints", checkpoint))
    step = checkpoints.latest or 0
    if step > trainer.steps:
      raise UserError(f"{workdir} is at step {step}, past the {trainer.steps} steps of the config")
    if checkpoints.latest is None:
      state = trainer.initial_state()
    else:
      log.info("continuing %s from step %d", workdir, step)
      state = checkpoints.restore(trainer.abstract_state())
    summary, table = trainer.overview(state)
    log.info("%s", summary)
    if jax.process_index() == 0:
      write_text(workdir / PARAMETERS_FILE, table)
    metrics = enter(Metrics(workdir, logging_settings, step, config))
    progress = enter(Progress(step, trainer.steps, trainer.images_per_step))
    preemption = stack.enter_context(_Preemption())
    window = _Window(checkpoints)

    def due(every: int) -> bool:
      return step == trainer.steps or (every > 0 and step % every == 0)

    def evaluate() -> dict[str, float]:
      with progress.paused():
        values = trainer.evaluate(state)
      metrics.write("eval", step, values)
      log.info("step %d  evaluation  %s", step, short_line(values))
      return values

    # The file of the records is process 0's.
    done = multihost_utils.broadcast_one_to_all(np.array(step in metrics.steps("eval")))
    if due(trainer.eval_every) and not done:
      evaluate()  # of the start, or of a checkpoint whose evaluation was cut off
    batches = enter(trainer.batches(step)) if step < trainer.steps else iter(())
    while step < trainer.steps:
      batch = next(batches)
      with jax.transfer_guard("disallow"):
        state, values = trainer.step(state, batch)
      step += 1
      window.add(step, values)
      progress.advance(values)
      stop = preemption.requested(step)
      if due(logging_settings.every):
        record = window.mean()
        record |= progress.report(step, {k: record[k] for k in trainer.shown if k in record})
        metrics.write("train", step, record)
      evaluated = evaluate() if due(trainer.eval_every) and not stop else None
      if due(checkpoint.every) or stop:
        window.check()  # a state that is not finite is never saved
        with progress.paused():
          checkpoints.save(step, state, evaluated)
      if stop:
        checkpoints.wait()
        log.info("stopped by a signal; saved step %d of %d", step, trainer.steps)
        return False
    checkpoints.wait()
    trainer.export(state, workdir)
    return True


class _Window:
  """Metrics of the updates since the last record. They stay on the device until they are needed."""

  def __init__(self, checkpoints: Checkpoints):
    self._checkpoints = checkpoints
    self._pending: collections.deque[tuple[int, Mapping[str, jax.Array]]] = collections.deque()
    self._fetched: list[Mapping[str, np.ndarray]] = []

  def add(self, step: int, values: Mapping[str, jax.Array]) -> None:
    """Metrics of an update that was started; waits for earlier ones if too many are unfinished."""
    self._pending.append((step, values))
    if len(self._pending) > _IN_FLIGHT:
      jax.block_until_ready(self._pending[-_IN_FLIGHT - 1][1])

  def check(self) -> None:
    """Fetches what is pending. Raises UserError naming the first step and metrics not finite."""
    steps, pending = zip(*self._pending, strict=True) if self._pending else ((), ())
    self._pending.clear()
    for step, values in zip(steps, jax.device_get(pending), strict=True):
      bad = [name for name, x in values.items() if not np.all(np.isfinite(x))]
      if bad:
        self._checkpoints.wait()
        kept = self._checkpoints.latest
        saved = "nothing was saved" if kept is None else f"the checkpoint of step {kept} is intact"
        raise UserError(f"step {step}: {', '.join(bad)} not finite; {saved}")
      self._fetched.append(values)

  def mean(self) -> dict[str, float | np.ndarray]:
    """Mean of each metric over the updates since the last call."""
    self.check()
    fetched, self._fetched = self._fetched, []
    return {k: np.mean([v[k] for v in fetched], axis=0, dtype=np.float64) for k in fetched[0]}


class _Preemption:
  """Whether this job was told to stop (SIGTERM), agreed on by all processes."""

  def __enter__(self):
    self._received = False
    # With several processes jax itself takes the signal and finds a step that all will reach.
    self._distributed = jax.distributed.is_initialized()
    self._main_thread = threading.current_thread() is threading.main_thread()
    if not self._distributed and self._main_thread:
      self._previous = signal.signal(signal.SIGTERM, self._receive)
    return self

  def _receive(self, signum, frame):
    self._received = True

  def requested(self, step: int) -> bool:
    if self._distributed:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._received

  def __exit__(self, *exc):
    if not self._distributed and self._main_thread:
      signal.signal(signal.SIGTERM, self._previous)
