"""Trains a tokenizer, or a generator on its tokens.

  python -m coda_jax.train --config=configs/mar.py [--workdir=runs/mar] [--config.data.train=...]

The same command continues a run that was stopped or killed. On a TPU pod run it on every host. The
exit code is 75 if the run was told to stop and saved: run it again.
"""

import argparse
import contextlib
import logging
import os
import re

import jax

from coda_jax import cli, config, outputs, sharding
from coda_jax.training import loop, registry
from coda_jax.training import workdir as workdirs

log = logging.getLogger("coda_jax")
_ADDRESS = r"([^\s:/]+|\[[0-9a-fA-F:]+\]):\d{1,5}"


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(prog="python -m coda_jax.train", description=__doc__)
  p.add_argument("--workdir", type=cli.path, help="folder of the run (runs/CONFIG[_ARGUMENT])")
  p.add_argument(
    "--accept-changed-data",
    action="store_true",
    help="continue though images were added or removed since the run began",
  )
  add_distributed_flags(p)
  return p


def main(argv=None):
  cli.main(run, parser(), argv, config=True)


def run(args: argparse.Namespace) -> int:
  """Trains; see the module's docstring. Returns the exit code."""
  settings = registry.resolve(args.config)
  initialize_distributed(args)
  workdir = args.workdir or cli.default_workdir(args.config_spec)
  first = jax.process_index() == 0
  with contextlib.ExitStack() as stack:
    if first:
      stack.enter_context(outputs.locked(workdir, "--workdir"))
      workdirs.check(workdir, settings, registry.product(settings))
    log.info("workdir: %s", workdir)
    trainer = registry.make_trainer(settings, sharding.make_mesh(settings.mesh))
    fields = config.to_json(settings)
    if first:  # not before, so that a mistyped path claims no workdir
      found = trainer.inventory()
      for key, data in found.items():
        data.log(f"config.{key}")
      workdirs.check_data(workdir, found, args.accept_changed_data)
      workdirs.claim(workdir, fields, found)
    if not loop.run(trainer, workdir, settings.checkpoint, settings.logging, fields):
      return cli.RUN_AGAIN
  log.info("done: %s", workdir / trainer.product)
  return 0


def add_distributed_flags(parser: argparse.ArgumentParser) -> None:
  """Flags for several processes; on TPU pods `--distributed` alone is enough."""
  group = parser.add_argument_group("several processes")
  group.add_argument("--distributed", action="store_true", help="find the other processes")
  group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0")
  group.add_argument("--num-processes", type=cli.integer(1))
  group.add_argument("--process-id", type=cli.integer(0))


def initialize_distributed(args: argparse.Namespace) -> None:
  """Joins the other processes if the flags, or jax's own environment variables, ask for it."""
  flags = args.coordinator, args.num_processes, args.process_id
  if args.coordinator is not None and not re.fullmatch(_ADDRESS, args.coordinator):
    raise cli.UsageError(f"--coordinator {args.coordinator}: write HOST:PORT")
  if any(f is not None for f in flags) and None in flags:
    raise cli.UsageError("--coordinator, --num-processes and --process-id belong together")
  if args.coordinator and args.process_id >= args.num_processes:
    raise cli.UsageError(
      f"--process-id {args.process_id}: with --num-processes {args.num_processes} they are 0 to "
      f"{args.num_processes - 1}"
    )
  wanted = args.distributed or args.coordinator or "JAX_COORDINATOR_ADDRESS" in os.environ
  if wanted and not jax.distributed.is_initialized():
    jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
  if jax.process_index() > 0:
    log.setLevel(logging.WARNING)


if __name__ == "__main__":
  main()
