"""How a command joins the other processes of its run: flags, jax's own discovery, one way out."""

import argparse
import contextlib
import ctypes
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator

import jax
from jax._src import distributed as jax_distributed

from coda_jax import cli
from coda_jax.config import DistributedSettings
from coda_jax.errors import UserError, one_line
from coda_jax.hosts import Hosts, end

log = logging.getLogger("coda_jax")
_ADDRESS = r"([^\s:/]+|\[[0-9a-fA-F:]+\]):\d{1,5}"


def add_flags(parser: argparse.ArgumentParser) -> None:
  """The flags of every command that runs over several processes."""
  group = parser.add_argument_group("several processes")
  group.add_argument(
    "--distributed",
    action="store_true",
    help="find the others: on TPU pods, GKE, Slurm and Open MPI",
  )
  group.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: address of process 0")
  group.add_argument("--num-processes", type=cli.integer(1), metavar="N", help="elsewhere")
  group.add_argument("--process-id", type=cli.integer(0), metavar="I", help="elsewhere: 0 to N-1")


@contextlib.contextmanager
def joined(
  args: argparse.Namespace, settings: DistributedSettings | None = None
) -> Iterator[Hosts | None]:
  """Joins the other processes while the block runs, if the flags or jax's variables ask for it.

  Yields:
    The processes, or None if this is the only one. All leave the block together.

  Raises:
    UsageError: wrong flags.
    UserError: no cluster is found; or the block failed, and the message names this process.
  """
  settings = settings or DistributedSettings()
  if not _wanted(args):
    yield None
    return
  with _aborting() as verdict:
    verdict.append(lambda: end(_not_met(args, settings), 1))
    _initialize(args, settings)
    if jax_distributed.global_state.num_processes == 1:
      yield None
      return
    hosts = Hosts(settings.heartbeat_timeout)
    verdict.append(hosts.aborted)
    yield from _together(hosts)


def _together(hosts: Hosts) -> Iterator[Hosts]:
  try:
    hosts.start()
    yield hosts
    hosts.finish()
  except BaseException as e:
    if isinstance(e, KeyboardInterrupt) and hosts.stopping.is_set():
      hosts.finish()  # all have saved
      raise
    line = hosts.fail(e)
    if isinstance(e, Exception):
      raise UserError(line) from e
    raise


def _wanted(args: argparse.Namespace) -> bool:
  """Whether the flags or jax's variables name other processes."""
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
  return bool(args.distributed or args.coordinator or "JAX_COORDINATOR_ADDRESS" in os.environ)


def _not_met(args: argparse.Namespace, settings: DistributedSettings) -> str:
  return (
    f"the {args.num_processes or 'other'} processes did not all meet within "
    f"{settings.initialization_timeout} s at {args.coordinator or 'the coordinator'}: start the "
    "same command on every host; config.distributed.initialization_timeout waits longer"
  )


def _initialize(args: argparse.Namespace, settings: DistributedSettings) -> None:
  """Joins the other processes."""
  jax.config.update("jax_enable_preemption_service", False)  # signals are ours
  if os.environ.get("TF_CPP_MIN_LOG_LEVEL") == "3":  # of `cli.quiet`
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "4"  # not what C++ says when another process is gone
  try:
    jax.distributed.initialize(
      args.coordinator,
      args.num_processes,
      args.process_id,
      initialization_timeout=settings.initialization_timeout,
      # The watcher is faster and names the process; this is for a watcher that hangs.
      heartbeat_timeout_seconds=settings.heartbeat_timeout + 15,
      shutdown_timeout_seconds=settings.shutdown_timeout,
    )
  except ValueError as e:
    raise cli.UsageError(
      "--distributed finds no TPU pod, GKE, Slurm or Open MPI here: give --coordinator, "
      f"--num-processes and --process-id ({one_line(e)})"
    ) from e
  except jax.errors.JaxRuntimeError as e:
    raise UserError(f"the processes cannot meet: {one_line(e)}") from e
  if jax_distributed.global_state.process_id > 0:
    log.setLevel(logging.WARNING)


@contextlib.contextmanager
def _aborting() -> Iterator[list[Callable[[], None]]]:
  """Where C++ code aborts this process, one line and an exit code take the place of its trace.

  jax's coordination service aborts processes from its own threads and takes no callback from
  Python. `abort` runs a handler of C for SIGABRT in the thread that calls it; ctypes makes ours
  one.

  Yields:
    A list. The last function in it is called; if it returns, the abort goes on.
  """
  verdict: list[Callable[[], None]] = []

  def handle(signum):
    verdict[-1]()
    libc.signal(signum, signal.SIG_DFL)
    print("error: aborted by a library's C++ code (--debug shows where)", file=sys.stderr)

  libc = ctypes.CDLL(None)
  libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle)
  previous = libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
  try:
    yield verdict
  finally:
    libc.signal(signal.SIGABRT, previous)
