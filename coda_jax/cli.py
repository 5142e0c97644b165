"""What every command shares: exit codes, one-line errors, quiet libraries, config flags.

Exit codes: 0 done, 1 failed with one line on stderr (`--debug` adds the traceback),
2 wrong usage, 75 stopped by a signal and saved (run it again), 130 interrupted.
"""

import argparse
import importlib.util
import inspect
import logging
import math
import os
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
import ml_collections
import tqdm
from absl import flags
from ml_collections import config_flags

from coda_jax import storage
from coda_jax.errors import UserError, describe, one_line

# The C++ parts of XLA, gRPC and libtpu read these once, when the first backend starts.
_QUIET_ENVIRONMENT = {
  "TF_CPP_MIN_LOG_LEVEL": "3",
  "GRPC_VERBOSITY": "NONE",
  "GLOG_minloglevel": "3",
  "TPU_STDERR_LOG_LEVEL": "3",
  "TPU_MIN_LOG_LEVEL": "3",
}
_QUIET_LOGGERS = ("absl", "jax", "jaxlib", "orbax", "flax", "grain", "matplotlib", "PIL", "gcsfs")
_NO_CACHE = "--no-compilation-cache"
RUN_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
INTERRUPTED = 130  # 128 + SIGINT, as shells count


class UsageError(Exception):
  """A command line that its parser could not know to be wrong: exit code 2."""


class Parser(argparse.ArgumentParser):
  """Wrong usage is one line too."""

  def error(self, message: str) -> NoReturn:
    self.exit(2, f"{self.prog}: error: {one_line(message)} (--help lists the options)\n")


def main(
  run: Callable[[argparse.Namespace], int | None],
  parser: argparse.ArgumentParser,
  argv: Sequence[str] | None = None,
  *,
  config: bool = False,
) -> None:
  """Parses the command line, calls `run(args)` and exits with the right code.

  Args:
    run: the command; returns None or an exit code.
    parser: its options; `--debug` and `--no-compilation-cache` are understood anywhere on the
      command line.
    argv: arguments without the program's name; `sys.argv[1:]` by default.
    config: adds `--config=FILE.py[:ARG]` and the overrides `--config.key.subkey=value`;
      `args.config` is then the `ml_collections.ConfigDict` with the overrides applied, locked,
      and `args.config_spec` the text `FILE.py[:ARG]`.

  Raises:
    SystemExit: always. `run` may raise UserError (1) or UsageError (2).
  """
  argv = list(sys.argv[1:] if argv is None else argv)
  # By hand: argparse would take it only before or only after a subcommand.
  debug, keep = "--debug" in argv, _NO_CACHE not in argv
  argv = [a for a in argv if a not in ("--debug", _NO_CACHE)]
  parser.add_argument("--debug", action="store_true", help="show the traceback of a failure")
  parser.add_argument(
    _NO_CACHE,
    action="store_true",
    help="do not keep compiled programs in ~/.cache/coda_jax for the next start",
  )
  parser.allow_abbrev = False
  if config:
    parser.add_argument(
      "--config",
      metavar="FILE.py[:ARG]",
      required=True,
      help="settings; --config.key.subkey=value overrides one",
    )
  if not debug:
    quiet()
  if keep:
    keep_compiled()
  sys.exit(_exit_code(lambda: _run(run, parser, argv, config), debug))


def _run(run, parser, argv, config):
  if config:
    args, overrides = parser.parse_known_args(argv)
    for arg in overrides:
      if arg.startswith("-") and not arg.lstrip("-").removeprefix("no").startswith("config."):
        parser.error(f"unrecognized argument: {arg}")
    args.config_spec = args.config
    args.config = load_config(args.config_spec, overrides, parser.error)
  else:
    args = parser.parse_args(argv)
  try:
    return run(args)
  except (UsageError, argparse.ArgumentTypeError) as e:
    parser.error(str(e))


def path(text: str) -> storage.Path:
  """A path of the command line, for argparse's `type`; `~` is the home folder."""
  if not text or "\0" in text:
    raise argparse.ArgumentTypeError("the path is empty" if not text else "a path with a null byte")
  try:
    return storage.path(text)
  except UserError as e:
    raise argparse.ArgumentTypeError(str(e)) from e


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
  """A whole number of the command line, for argparse's `type`."""

  def parse(text: str) -> int:
    try:
      value = int(text)
    except ValueError:
      raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
    if not least <= value <= most:
      raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}")
    return value

  return parse


def number(least: int | float, most: int | float = math.inf) -> Callable[[str], float]:
  """A finite number of the command line, for argparse's `type`."""

  def parse(text: str) -> float:
    try:
      value = float(text)
    except ValueError:
      raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not (math.isfinite(value) and least <= value <= most):
      limits = f"at least {least}" + (f" and at most {most}" if math.isfinite(most) else "")
      raise argparse.ArgumentTypeError(f"{text} is not {limits}")
    return value

  return parse


def several(kind: Callable[[str], Any]) -> Callable[[str], tuple]:
  """Values of a `kind` with commas between, for argparse's `type`."""
  return lambda text: tuple(kind(x) for x in text.split(","))


SIDES = several(integer(1, 2**15))  # of the levels' grids, `--patch-sizes`


def load_config(
  spec: str, overrides: Sequence[str] = (), error: Callable[[str], NoReturn] | None = None
) -> ml_collections.ConfigDict:
  """The `ConfigDict` of `FILE.py[:ARG]` with `--config.key=value` overrides applied, locked.

  Args:
    spec: the file defines `get_config()` or `get_config(arg)`. Where `configs/NAME.py` is no file,
      the one that the installed package carries is taken.
    overrides: command-line words, for example `["--config.seed=1"]`.
    error: called with one line when an override names an unknown key or has a wrong type;
      raises UserError by default.

  Raises:
    UserError: no such file, no `get_config`, or an argument that it does not take.
  """
  path, arg = _split(spec)
  loader = importlib.util.spec_from_file_location("coda_jax_config", _config_file(path))
  if loader is None or loader.loader is None:
    raise UserError(f"{path}: a config file is Python and its name ends in .py")
  module = importlib.util.module_from_spec(loader)
  loader.loader.exec_module(module)
  get_config = getattr(module, "get_config", None)
  if get_config is None:
    raise UserError(f"{path}: defines no function get_config")
  args = [arg] if arg else []
  try:
    inspect.signature(get_config).bind(*args)
  except TypeError:
    wanted = "takes no argument" if args else "needs an argument"
    raise UserError(
      f"{path}: get_config {wanted}: use --config={path}{'' if args else ':ARG'}"
    ) from None
  config = get_config(*args)

  def fail(message: str) -> NoReturn:
    if error is not None:
      error(message)
    raise UserError(message)

  for word in overrides:
    _check_key(word, config, fail)
  values = flags.FlagValues()  # our own: absl's global one is full of other libraries' flags
  words = ["coda_jax", *overrides]
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=words)
    rest = values(words)[1:]
  except (flags.Error, LookupError, AttributeError, TypeError, ValueError) as e:
    fail(one_line(e))
  if rest:
    fail(f"unrecognized argument: {rest[0]}")
  return config


def _split(spec: str) -> tuple[str, str]:
  """File and argument of `FILE.py[:ARG]`; folders of the file may hold colons."""
  match = re.fullmatch(r"(.*?\.py)(?::(.*))?", spec, re.DOTALL)
  if match:
    return match[1], match[2] or ""
  file, _, arg = spec.partition(":")
  return file, arg


def _config_file(path: str) -> pathlib.Path:
  """`path`, or where there is none the file of that name of the package or its checkout."""
  file = pathlib.Path(os.path.expanduser(path))
  package = importlib.util.find_spec("coda_jax.configs")  # none in a checkout
  checkout = [pathlib.Path(__file__).parents[1] / "configs"]
  folders = package.submodule_search_locations if package else checkout
  own = [pathlib.Path(f) / file.name for f in folders or () if file.parent.name == "configs"]
  for candidate in (file, *own):
    if candidate.is_file():
      return candidate
  raise UserError(f"{path}: no such config file")


def default_workdir(spec: str) -> pathlib.Path:
  """The folder of a run whose command names no other: `runs/<config>[_<argument>]`.

  `configs/flux.py:full,norm=layer` runs in `runs/flux_full,norm=layer`. Every character but
  letters, digits and `_=,.+-` becomes `-`.
  """
  path, arg = _split(spec)
  name = "_".join(filter(None, (pathlib.Path(path).stem, arg)))
  return pathlib.Path("runs") / re.sub(r"[^\w=,.+-]", "-", name)


def _check_key(word: str, config, fail: Callable[[str], NoReturn]) -> None:
  """Names the first part of `--config.a.b=value` that the config does not have."""
  path = word.partition("=")[0].lstrip("-").removeprefix("no").removeprefix("config.")
  if not word.startswith("-") or "[" in path:  # a value, or an index: ml_collections checks it
    return
  for part in path.split("."):
    known = list(config.keys()) if hasattr(config, "keys") else []
    if part not in known:
      fail(f"{word}: no config key {part!r}; known here: {', '.join(known) or 'none'}")
    config = config[part]


def keep_compiled() -> None:
  """Keeps programs that take a second or more to compile on this disk, for the next process.

  They go to `storage.cache_folder()`; a set `JAX_COMPILATION_CACHE_DIR` wins.
  """
  folder = storage.cache_folder()
  if folder is not None and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    jax.config.update("jax_compilation_cache_dir", str(folder))


class _Lines(logging.StreamHandler):
  """Lines on stderr that stand above the progress bars of a terminal, not within one."""

  def emit(self, record: logging.LogRecord) -> None:
    if self.stream.closed or not self.stream.isatty():
      return super().emit(record)
    with tqdm.tqdm.external_write_mode(file=self.stream):
      super().emit(record)


def quiet() -> None:
  """Silences what libraries print by themselves; the `coda_jax` logger writes to stderr."""
  for name, value in _QUIET_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  for name in _QUIET_LOGGERS:
    logging.getLogger(name).setLevel(logging.CRITICAL)
  warnings.filterwarnings("ignore")
  sys.unraisablehook = lambda _: None  # of a library's coroutine whose error we report
  log = logging.getLogger("coda_jax")
  log.setLevel(logging.INFO)
  if not log.handlers:
    handler = _Lines()
    handler.setFormatter(logging.Formatter("%(message)s"))
    log.addHandler(handler)
    log.propagate = False


def _exit_code(call: Callable[[], int | None], debug: bool) -> int:
  try:
    return call() or 0
  except BrokenPipeError:  # the reader of our output left, for example `| head`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except (Exception, KeyboardInterrupt) as e:
    if debug:
      traceback.print_exc()
    print(f"error: {describe(e)}", file=sys.stderr, flush=True)
    return INTERRUPTED if isinstance(e, KeyboardInterrupt) else 1
