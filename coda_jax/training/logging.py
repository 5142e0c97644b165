"""Where a run's numbers go: `metrics.jsonl`, TensorBoard, Weights & Biases and the terminal."""

import contextlib
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tqdm

from coda_jax import storage
from coda_jax.config import LoggingSettings
from coda_jax.errors import UserError
from coda_jax.outputs import write_text

log = logging.getLogger("coda_jax")
METRICS_FILE = "metrics.jsonl"
WANDB_FILE = "wandb_id.txt"
KINDS = ("train", "eval")


class Metrics:
  """Writes scalars of process 0; on other processes every method does nothing.

  Each record of `metrics.jsonl` is a line `{"kind": "train" or "eval", "step": s, name: number}`;
  a number that is not finite is null, a vector is one entry per level: `name/level_1`, …
  A run that is continued from `step` drops the records behind it, which it will write again.

  Args:
    workdir: of the run.
    settings: which writers.
    step: updates done so far.
    config: kept by Weights & Biases.
  """

  def __init__(
    self, workdir: str | os.PathLike, settings: LoggingSettings, step: int, config: Mapping
  ):
    self._active = jax.process_index() == 0
    self._tensorboard = self._wandb = None
    self._records = kept = [r for r in read_metrics(workdir) if r["step"] <= step]
    if not self._active:
      return
    self._spool = storage.Spool(storage.path(workdir))
    path = self._spool.folder / METRICS_FILE
    write_text(path, "".join(json.dumps(r) + "\n" for r in kept))
    if settings.tensorboard:
      from tensorboardX import SummaryWriter

      self._tensorboard = SummaryWriter(str(self._spool.folder / "tensorboard"), purge_step=step)
    if settings.wandb_project:
      self._wandb = _start_wandb(settings.wandb_project, workdir, config)
    self._file = path.open("a")

  def records(self, kind: str) -> list[dict]:
    """The records of `kind` that were there at the start."""
    return [r for r in self._records if r["kind"] == kind]

  def write(self, kind: str, step: int, values: Mapping[str, float | np.ndarray]) -> None:
    """Writes the values of one step to all writers. Raises UserError if the disk is full."""
    if not self._active:
      return
    flat = flatten(values)
    finite = {k: v if math.isfinite(v) else None for k, v in flat.items()}
    try:
      self._file.write(json.dumps({"kind": kind, "step": step} | finite) + "\n")
      self._file.flush()
    except OSError as e:
      raise UserError(f"cannot write {self._file.name}: {e.strerror}") from e
    if self._tensorboard:
      for name, value in flat.items():
        self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
      self._tensorboard.flush()
    if self._wandb:
      self._wandb.log({f"{kind}/{k}": v for k, v in flat.items()}, step=step)
    self._spool.push()

  def close(self) -> None:
    """Flushes and closes all writers."""
    if not self._active:
      return
    with contextlib.suppress(OSError):  # the disk is full: `write` said so
      self._file.close()
    if self._tensorboard:
      self._tensorboard.close()
    if self._wandb:
      self._wandb.finish()
    self._spool.close()


def _start_wandb(project: str, workdir, config: Mapping):
  try:
    import wandb  # pyright: ignore[reportMissingImports]  # an extra
  except ImportError as e:
    raise UserError(
      f"config.logging.wandb_project={project}: wandb is not installed (pip install wandb)"
    ) from e
  folder = storage.absolute(storage.path(workdir))
  name, file = folder.name, folder / WANDB_FILE
  if not file.exists():
    write_text(file, secrets.token_hex(8) + "\n")
  run = file.read_text().strip()  # a run that is continued keeps its id
  return wandb.init(project=project, name=name, id=run, resume="allow", config=dict(config))


def flatten(values: Mapping[str, float | np.ndarray]) -> dict[str, float]:
  """Scalars as floats, vectors level by level."""
  out = {}
  for name, value in values.items():
    value = np.asarray(value, np.float64)
    if value.ndim:
      out |= {f"{name}/level_{i}": float(v) for i, v in enumerate(value.ravel(), 1)}
    else:
      out[name] = float(value)
  return out


def read_metrics(workdir: str | os.PathLike) -> list[dict]:
  """The records of `metrics.jsonl`, if there is one; a last line cut off by a kill is left out."""
  records, file = [], storage.path(workdir) / METRICS_FILE
  for line in file.read_text().splitlines() if file.is_file() else ():
    try:
      records.append(json.loads(line))
    except ValueError:
      continue
  return records


class Progress:
  """Steps per second, images per second and losses: a bar in a terminal, plain lines elsewhere.

  Args:
    start, total: updates done and to do.
    images: of one update.
  """

  def __init__(self, start: int, total: int, images: int):
    self._images, self._total = images, total
    self._step, self._time = start, None
    self._bar = None
    if jax.process_index() == 0 and sys.stderr.isatty():
      self._bar = tqdm.tqdm(initial=start, total=total, unit="step", dynamic_ncols=True)

  def advance(self, result) -> None:
    """An update was started; `result` are arrays that it will compute."""
    if self._bar is not None:
      self._bar.update()
    if self._time is None:  # the first one compiled, which is not part of the speed
      jax.block_until_ready(result)
      self._step, self._time = self._step + 1, time.perf_counter()

  def report(self, step: int, shown: Mapping[str, float]) -> dict[str, float]:
    """Shows `shown` after `step` updates; returns the rates since the last report."""
    now = time.perf_counter()
    seconds = now - (now if self._time is None else self._time)
    rate = (step - self._step) / seconds if step > self._step else 0.0
    self._step, self._time = step, time.perf_counter()
    speed = f"{rate:.3g} step/s  {rate * self._images:.3g} images/s"
    text = "  ".join(f"{k} {v:.4g}" for k, v in shown.items())
    if self._bar is not None:
      self._bar.set_postfix_str(f"{speed}  {text}")
    elif jax.process_index() == 0:
      log.info("step %d/%d  %s  %s", step, self._total, speed, text)
    return {"steps_per_second": rate, "images_per_second": rate * self._images}

  @contextlib.contextmanager
  def paused(self):
    """What happens inside is not part of the speed."""
    start = time.perf_counter()
    yield
    if self._time is not None:
      self._time += time.perf_counter() - start

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()


def parameter_summary(groups: Mapping[str, Mapping[str, jax.Array]]) -> str:
  """A line for each group of arrays: how many arrays and parameters, and their size."""

  def line(name, arrays):
    size = sum(x.size for x in arrays.values())
    mib = sum(x.size * x.dtype.itemsize for x in arrays.values()) / 2**20
    return f"{name}: {len(arrays)} arrays, {size:,} parameters, {mib:,.1f} MiB"

  return "\n".join(line(*group) for group in groups.items() if group[1])


def parameter_table(arrays: Mapping[str, jax.Array]) -> str:
  """A table of arrays: path, shape, type, parameters."""
  from clu import parameter_overview  # imports much

  params: Any = dict(arrays)
  return parameter_overview.get_parameter_overview(params, include_stats=False)
