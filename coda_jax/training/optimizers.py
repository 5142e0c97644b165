"""AdamW in groups, its schedule, and the moving average of what trains."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from coda_jax.arrays import Arrays
from coda_jax.config import EMASettings, OptimizerSettings


def make_optimizer(
  settings: OptimizerSettings, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """(AdamW on {dotted path: array} behind a clip by the global norm, its rate by update).

  Args:
    settings: regexes over the paths choose each array's weight decay and factor of the rate.
    steps: length of the run, which is the schedule's unless the settings give another.
  """
  length = (settings.schedule_steps or steps) - settings.warmup_steps
  schedule = optax.cosine_decay_schedule(settings.learning_rate, max(1, length))
  if settings.warmup_steps:
    warmup = optax.linear_schedule(0.0, settings.learning_rate, settings.warmup_steps)
    schedule = optax.join_schedules([warmup, schedule], [settings.warmup_steps])

  def by_path(pairs, transform: Callable[[float], optax.GradientTransformation], default: float):
    """`transform(x)` with the x of the first pair whose regex matches a parameter's path."""

    def labels(params):
      return {p: next((x for r, x in pairs if re.search(r, p)), default) for p in params}

    return optax.partition({x: transform(x) for _, x in (*pairs, ("", default))}, labels)

  optimizer = optax.chain(
    optax.clip_by_global_norm(settings.clip),
    optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
    by_path(settings.weight_decay, optax.add_decayed_weights, 0.0),
    by_path(settings.rates, optax.scale, 1.0),
    optax.scale_by_learning_rate(schedule),
  )
  return optimizer, schedule


def descend(
  optimizer: optax.GradientTransformation,
  gradients: Arrays,
  state: optax.OptState,
  params: Arrays,
) -> tuple[Arrays, optax.OptState]:
  """(parameters, optimizer state) after an update."""
  updates, state = optimizer.update(gradients, state, params)
  updated: Any = optax.apply_updates(params, updates)
  return updated, state


def ema_decay(settings: EMASettings, step: jax.Array, steps_per_epoch: int) -> jax.Array:
  """Decay of the average at zero-based update `step`; 0, a plain copy, in the first epochs."""
  decay = jnp.minimum(settings.decay, (step // 2 + 1) / (step // 2 + 10))
  return jnp.where(step < settings.start_epoch * steps_per_epoch, 0.0, decay)


def averaged(average: Arrays, params: Arrays, decay: jax.Array) -> Arrays:
  """decay·average + (1 − decay)·params."""
  return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
