"""Trains a tokenizer, or a generator on its tokens.

  python -m coda_jax.train --config=configs/mar.py [--workdir=runs/mar] [--config.data.train=...]

The same command continues a run that was stopped or killed. On a TPU pod run it on every host. The
exit code is 75 if the run was told to stop and saved: run it again.
"""

import argparse
import contextlib
import logging

import jax

from coda_jax import cli, config, distributed, outputs, sharding
from coda_jax.training import loop, registry
from coda_jax.training import workdir as workdirs
from coda_jax.training.preemption import Preemption

log = logging.getLogger("coda_jax")


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.train",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument("--workdir", type=cli.path, help="folder of the run (runs/CONFIG[_ARGUMENT])")
  p.add_argument(
    "--accept-changed-data",
    action="store_true",
    help="continue though images were added or removed since the run began",
  )
  distributed.add_flags(p)
  return p


def main(argv=None):
  cli.main(run, parser(), argv, config=True)


def run(args: argparse.Namespace) -> int:
  """Trains; see the module's docstring. Returns the exit code."""
  settings = registry.resolve(args.config)
  workdir = args.workdir or cli.default_workdir(args.config_spec)
  with contextlib.ExitStack() as stack:
    preemption = stack.enter_context(Preemption())
    hosts = stack.enter_context(distributed.joined(args, settings.distributed))
    preemption.attach(hosts)
    first = jax.process_index() == 0
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
      workdirs.check_data(workdir, found, args.accept_changed_data)
      workdirs.claim(workdir, fields, found)
    log.info("%s", _plan(trainer))
    if not loop.run(trainer, workdir, settings.checkpoint, settings.logging, fields, preemption):
      return cli.RUN_AGAIN
  log.info("done: %s", workdir / trainer.product)
  return 0


def _plan(trainer) -> str:
  """What the run will do, in one line."""
  mesh, devices = trainer.mesh, trainer.mesh.devices
  axes = " x ".join(f"{name} {n}" for name, n in mesh.shape.items() if n > 1)
  return (
    f"{trainer.steps:,} updates of {trainer.images_per_step} images on {devices.size} "
    f"{devices.flat[0].device_kind}{f' ({axes})' if axes else ''}"
  )


if __name__ == "__main__":
  main()
