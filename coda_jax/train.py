"""Trains a tokenizer, or a generator on its tokens.

  python -m coda_jax.train --config=configs/mar.py [--workdir=runs/mar] [--config.data.train=...]

The same command continues a run that was stopped or killed. On a TPU pod run it on every host.
"""

import argparse
import json
import logging
import os
import pathlib

import jax

from coda_jax import cli, config, sharding
from coda_jax.errors import UserError
from coda_jax.outputs import write_text
from coda_jax.training import loop, registry

log = logging.getLogger("coda_jax")
CONFIG_FILE = "config.json"


def main(argv=None):
  parser = argparse.ArgumentParser(prog="python -m coda_jax.train", description=__doc__)
  parser.add_argument(
    "--workdir", type=pathlib.Path, help="folder of the run (default: runs/CONFIG[_ARGUMENT])"
  )
  add_distributed_flags(parser)
  cli.main(run, parser, argv, config=True)


def run(args: argparse.Namespace) -> None:
  """Trains; see the module's docstring."""
  settings = registry.resolve(args.config)
  initialize_distributed(args)
  workdir = args.workdir or cli.default_workdir(args.config_spec)
  check_workdir(workdir, settings)
  log.info("workdir: %s", workdir)
  trainer = registry.make_trainer(settings, sharding.make_mesh(settings.mesh))
  fields = config.to_json(settings)
  if jax.process_index() == 0:  # not before, so that a mistyped path claims no workdir
    write_text(workdir / CONFIG_FILE, json.dumps(fields, indent=2) + "\n")
  if loop.run(trainer, workdir, settings.checkpoint, settings.logging, fields):
    log.info("done: %s", workdir / trainer.product)


def add_distributed_flags(parser: argparse.ArgumentParser) -> None:
  """Flags for several processes; on TPU pods `--distributed` alone is enough."""
  group = parser.add_argument_group("several processes")
  group.add_argument("--distributed", action="store_true", help="find the other processes")
  group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
  group.add_argument("--num-processes", type=int)
  group.add_argument("--process-id", type=int)


def initialize_distributed(args: argparse.Namespace) -> None:
  """Joins the other processes if the flags, or jax's own environment variables, ask for it."""
  wanted = args.distributed or args.coordinator or "JAX_COORDINATOR_ADDRESS" in os.environ
  if wanted and not jax.distributed.is_initialized():
    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
  if jax.process_index() > 0:
    log.setLevel(logging.WARNING)


def check_workdir(workdir: pathlib.Path, settings) -> None:
  """Makes `workdir` if it is not there, and checks that a run with `settings` may be in it.

  Raises:
    UserError: the folder cannot be written, or holds a run with another config.
  """
  if jax.process_index() > 0:
    return
  file = workdir / CONFIG_FILE
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if file.exists():
      config.check_resumable(settings, json.loads(file.read_text()), workdir)
    elif (workdir / "checkpoints").exists():
      raise UserError(f"{workdir} holds checkpoints but no {file.name}; take a new --workdir")
  except OSError as e:
    raise UserError(f"--workdir={workdir} cannot be written: {e.strerror}") from e
  except ValueError as e:
    raise UserError(f"{file} is not valid JSON ({e}); take a new --workdir") from e


if __name__ == "__main__":
  main()
