"""Compiles a program of a run for a TPU pod, on a machine without a TPU, and tells what it needs.

  python -m coda_jax.compile_check --config=configs/flux.py --topology=v5e-64 \\
      --config.dtype=bfloat16 [--config.data.batch_size=512 ...] [--what=update|eval|sample|encode]

The program is the trainer's own. Weights and data need not be there: shapes are enough. Times are
least times by the chip's peaks (a roofline), not measurements; docs/scaling.md says what they leave
out. Compiling takes minutes; results are kept in the file of --json, so the same command goes on
where it was stopped.

Exit codes: 0 it fits as it is, 1 it does not or something failed, 2 wrong usage.
"""

import argparse
import functools
import logging

import jax

from coda_jax import cli, config
from coda_jax.errors import UserError
from coda_jax.planning import chips, compiling, early, programs, table, verdict
from coda_jax.training import registry

log = logging.getLogger("coda_jax")
# The config that trains a tokenizer which configs/maskgit.py names.
_TOKENIZERS = {
  "runs/mar/tokenizer": "configs/mar.py",
  "runs/flux/tokenizer": "configs/flux.py",
  "runs/demo_tokenizer/tokenizer": "configs/demo.py:thumbnails",
}


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.compile_check",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  p.add_argument(
    "--topology", required=True, metavar="NAME", help="v5e:8x8 or v5e-64, v4:2x2x4 or v4-32, ..."
  )
  p.add_argument("--slices", type=cli.integer(1, 64), default=1, help="pods of that shape (1)")
  p.add_argument("--what", choices=programs.WHAT, default="update", help="(%(default)s)")
  p.add_argument("--search", action="store_true", help="find the largest batch of a device")
  p.add_argument(
    "--no-remedies", action="store_true", help="do not try what makes it fit, if it does not"
  )
  p.add_argument(
    "--no-code",
    action="store_true",
    help="stop before code generation, most of the time: memory is that of arrays alone",
  )
  p.add_argument("--json", type=cli.path, metavar="FILE", help="keep the results there")
  p.add_argument(
    "--tokenizer-config",
    metavar="FILE.py[:ARG]",
    help="of a generator whose tokenizer is not there: the config that trains it",
  )
  return p


def run(args: argparse.Namespace) -> int:
  """Compiles and prints; see the module's docstring."""
  try:
    topology = chips.parse(args.topology, args.slices)
  except UserError as e:
    raise cli.UsageError(str(e)) from e
  settings, tokenizer = registry.resolve(args.config), _tokenizer(args)
  if args.what == {"tokenizer": "sample", "maskgit": "encode"}[settings.kind]:
    raise cli.UsageError(f"--what={args.what}: kind {settings.kind!r} has no such program")
  store = compiling.Store(args.json)
  jax.config.update("jax_platforms", "cpu")
  devices = chips.devices(topology)

  def measure(settings) -> dict:
    program = programs.make(args.what, settings, devices, tokenizer)
    optimize = functools.partial(early.optimize, args.what, settings, topology, tokenizer)
    return compiling.measure(program, topology, store, optimize if args.no_code else None)

  given = {"config": args.config_spec, "what": args.what, "code": not args.no_code}
  tools = args.what, settings, devices, functools.cache(measure), log.info
  result = given | {"remedies": [], "search": [], "largest": None} | tools[3](settings)
  if args.search:
    result["largest"], result["search"] = verdict.search(*tools)
  elif not result["fits"] and not args.no_remedies:
    log.info("%s; what makes it fit is being tried", table.verdict(result))
    result["remedies"] = verdict.try_remedies(*tools)
  store.finish(result)
  print("\n".join(table.lines(result)))
  return 0 if result["fits"] else 1


def _tokenizer(args: argparse.Namespace) -> config.TrainConfig | None:
  """Settings of the tokenizer's training, of a generator whose tokenizer may not be there."""
  if args.config.get("kind") != "maskgit":
    if args.tokenizer_config is not None:
      raise cli.UsageError("--tokenizer-config is for a config of kind 'maskgit'")
    return None
  spec = args.tokenizer_config
  if spec is None and args.config.data.tokenizer not in _TOKENIZERS:
    return None
  spec = _TOKENIZERS[args.config.data.tokenizer] if spec is None else spec
  settings = registry.resolve(cli.load_config(spec))
  if not isinstance(settings, config.TrainConfig):
    raise UserError(f"--tokenizer-config={spec} is of kind {settings.kind!r}, not 'tokenizer'")
  return settings


def main(argv=None):
  cli.main(run, parser(), argv, config=True)


if __name__ == "__main__":
  main()
