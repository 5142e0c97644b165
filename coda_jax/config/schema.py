"""Settings that every trainer has.

A field's name is its key on the command line: `--config.optimizer.learning_rate=1e-4`.
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence

from coda_jax.config.engine import ranged
from coda_jax.errors import UserError

DTYPES = ("float32", "bfloat16")
# Rematerialisation: the backward pass keeps every saved residual, or computes the inside of each
# residual block again from the block's input.
REMAT = ("none", "blocks")


def check_choice(key: str, value: str, choices: Sequence[str]) -> None:
  """Raises UserError if `value` of `config.<key>` is none of `choices`."""
  if value not in choices:
    raise UserError(f"config.{key}={value!r}; it is one of {', '.join(choices)}")


def check_regexes(where: str, patterns: Iterable[str]) -> None:
  """Raises UserError for the first pattern that is no regular expression."""
  for pattern in patterns:
    try:
      re.compile(pattern)
    except re.error as e:
      raise UserError(f"{where}: {pattern!r} is not a regular expression ({e})") from e


def check_batch_size(batch_size: int, accumulation: int) -> None:
  """Raises UserError unless `accumulation` micro-batches of one size make up a batch."""
  if batch_size < 1 or accumulation < 1 or batch_size % accumulation:
    raise UserError(
      f"config.data.batch_size={batch_size} is not a positive multiple of "
      f"config.data.accumulation={accumulation}"
    )


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
  """AdamW with a cosine schedule, behind a clip by the global norm.

  Attributes:
    learning_rate: at the first update after the warm-up.
    b1, b2, eps: Adam's.
    weight_decay: (regex over parameter paths, decay) pairs; the first that matches counts and a
      parameter that none matches has no decay.
    clip: largest global norm of the gradients.
    warmup_steps: updates of linear warm-up.
    schedule_steps: updates until the rate is 0; 0 means the length of the run.
    rates: (regex over parameter paths, factor) pairs; the first that matches multiplies the rate.
  """

  learning_rate: float = 5e-4
  b1: float = ranged(0.5, below=1)
  b2: float = ranged(0.9, below=1)
  eps: float = 1e-8
  weight_decay: tuple[tuple[str, float], ...] = (("", 0.005),)
  clip: float = ranged(10.0, above=0)
  warmup_steps: int = 0
  schedule_steps: int = 0
  rates: tuple[tuple[str, float], ...] = ()

  def __post_init__(self):
    check_regexes("weight_decay", [pattern for pattern, _ in self.weight_decay])
    check_regexes("rates", [pattern for pattern, _ in self.rates])


@dataclasses.dataclass(frozen=True)
class EMASettings:
  """Moving average of what trains, decay min(decay, (s//2 + 1) / (s//2 + 10)) at update s.

  Attributes:
    decay: its limit.
    start_epoch: epochs before it are a plain copy.
  """

  decay: float = ranged(0.9999, most=1)
  start_epoch: int = 4


@dataclasses.dataclass(frozen=True)
class EvalSettings:
  """Evaluation with the averaged weights, posterior mean, centre crops.

  Attributes:
    every: updates between two evaluations; 0 evaluates at the end alone.
    images: at most so many, spread evenly; 0 takes all.
    batch_size: images at a time over all devices.
    lpips: measure it too, if its weights are there.
  """

  every: int = 0
  images: int = 0
  batch_size: int = ranged(16, least=1)
  lpips: bool = True


@dataclasses.dataclass(frozen=True)
class CheckpointSettings:
  """What is saved when.

  Attributes:
    every: updates between two checkpoints.
    keep: latest checkpoints that stay.
    keep_best: best checkpoints, by `best_metric`, that stay.
    best_metric: a metric of the evaluation; a leading minus means that less is better.
  """

  every: int = ranged(1000, least=1)
  keep: int = ranged(2, least=1)
  keep_best: int = 1
  best_metric: str = "psnr"


@dataclasses.dataclass(frozen=True)
class LoggingSettings:
  """What is recorded where, beside `metrics.jsonl`.

  Attributes:
    every: updates between two records.
    tensorboard: write TensorBoard event files.
    wandb_project: project of Weights & Biases; empty goes without.
  """

  every: int = ranged(50, least=1)
  tensorboard: bool = True
  wandb_project: str = ""


@dataclasses.dataclass(frozen=True)
class DistributedSettings:
  """Several processes as one run; seconds.

  Attributes:
    heartbeat_timeout: silence after which a process counts as lost and ends the others.
    initialization_timeout: wait for all processes at the start.
    shutdown_timeout: wait for all processes at the end.
  """

  heartbeat_timeout: int = ranged(60, least=4)
  initialization_timeout: int = ranged(300, least=1)
  shutdown_timeout: int = ranged(300, least=1)


@dataclasses.dataclass(frozen=True)
class MeshSettings:
  """Devices and how arrays lie on them.

  Attributes:
    data, fsdp, model: devices along each axis; one of them may be -1, "all that are left".
      Batches are split over data x fsdp, parameters by `rules`.
    rules: (regex over parameter paths, one entry per dimension: a mesh axis or "") pairs; the
      first that matches counts and a parameter that none matches is on every device. An axis
      that does not divide its dimension is left out.
  """

  data: int = ranged(-1, least=-1)
  fsdp: int = ranged(1, least=-1)
  model: int = ranged(1, least=-1)
  rules: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"\.kernel$|\.lora_down$", ("", "", "", "fsdp")),
    (r"quantizer\.codebook$", ("model", "")),
  )

  def __post_init__(self):
    check_regexes("config.mesh.rules", [pattern for pattern, _ in self.rules])
    for _, spec in self.rules:
      for axis in spec:
        if axis not in ("", "data", "fsdp", "model"):
          raise UserError(f"config.mesh.rules: no mesh axis {axis!r}; there are data, fsdp, model")
