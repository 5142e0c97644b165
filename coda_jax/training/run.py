"""One run of a trainer in its workdir, whichever command asks for it."""

import contextlib
import logging
from typing import Any

import jax

from coda_jax import config, outputs, sharding, storage
from coda_jax.hosts import Hosts
from coda_jax.training import loop, registry
from coda_jax.training import workdir as workdirs
from coda_jax.training.preemption import Preemption
from coda_jax.training.trainer import Trainer

log = logging.getLogger("coda_jax")


def train(
  settings: Any,
  workdir: storage.Path,
  preemption: Preemption,
  hosts: Hosts | None = None,
  accept_changed_data: bool = False,
) -> bool:
  """Trains to the end, from the last checkpoint of `workdir` if it has one.

  The workdir is held while it trains. Of several processes each calls this.

  Args:
    settings: of a kind that `registry` knows, resolved.
    preemption: entered.
    hosts: the processes, if there are several.
    accept_changed_data: go on though images were added or removed.

  Returns:
    False if the run was told to stop, and saved.

  Raises:
    UserError: the workdir holds something else or is in use, or see `loop.run`.
  """
  first = jax.process_index() == 0
  if hosts is not None:  # each would wait for the others' part of the first checkpoint for ever
    hosts.check_shared(workdir, "--workdir")
  with contextlib.ExitStack() as stack:
    if first:
      stack.enter_context(outputs.locked(workdir, "--workdir"))
      workdirs.check(workdir, settings, registry.product(settings))
    log.info("workdir: %s", workdir)
    trainer = registry.make_trainer(settings, sharding.make_mesh(settings.mesh))
    fields, found = config.to_json(settings), trainer.inventory()
    if hosts is not None:
      hosts.check_same_data({f"config.{key}": data for key, data in found.items()})
    if first:  # not before, so that a mistyped path claims no workdir
      for key, data in found.items():
        data.log(f"config.{key}")
      workdirs.check_data(workdir, found, accept_changed_data)
      workdirs.claim(workdir, fields, found)
    log.info("%s", _plan(trainer))
    return loop.run(trainer, workdir, settings.checkpoint, settings.logging, fields, preemption)


def _plan(trainer: Trainer) -> str:
  """What the run will do, in one line."""
  mesh, devices = trainer.mesh, trainer.mesh.devices
  axes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items() if n > 1)
  return (
    f"{trainer.steps:,} updates of {trainer.images_per_step} images on {devices.size} "
    f"{devices.flat[0].device_kind}{f' ({axes})' if axes else ''}"
  )
