"""Trains a tokenizer, or a generator on its tokens.

  python -m coda_jax.train --config=configs/mar.py [--workdir=runs/mar] [--config.data.train=...]

The same command continues a run that was stopped or killed. On a TPU pod run it on every host. The
exit code is 75 if the run was told to stop and saved: run it again.
"""

import argparse
import contextlib
import logging

from coda_jax import cli, distributed
from coda_jax.training import registry
from coda_jax.training.preemption import Preemption
from coda_jax.training.run import train

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
    if not train(settings, workdir, preemption, hosts, args.accept_changed_data):
      return cli.RUN_AGAIN
  log.info("done: %s", workdir / registry.product(settings))
  return 0


if __name__ == "__main__":
  main()
