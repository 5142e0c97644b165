"""Several processes, usually one a host, that are one run.

They talk through the key-value store of jax's coordination service, which process 0 holds. A thread
of each process, the watcher, sends signs of life and listens for news:

- the failure of one process ends all of them, with its line;
- a process that falls silent (killed, or its host or network died) ends the others with a line that
  names it, and exit code `RUN_AGAIN`;
- a signal to one process is known to all (`training/preemption.py`).
"""

import argparse
import atexit
import contextlib
import ctypes
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax._src import distributed as jax_distributed

from coda_jax import cli
from coda_jax.config import DistributedSettings, to_json
from coda_jax.data import inventory
from coda_jax.errors import UserError, describe, one_line

log = logging.getLogger("coda_jax")
_ADDRESS = r"([^\s:/]+|\[[0-9a-fA-F:]+\]):\d{1,5}"
_PREFIX = "coda_jax"  # of our keys
_DAY = 86400.0
# Failures of jax that the loss of another process may have caused.
_OF_OTHERS = re.compile(
  r"gloo|unavailable|deadline|connect|socket|barrier|aborted|cancel|unhealthy", re.IGNORECASE
)


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
) -> Iterator["Hosts | None"]:
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
    verdict.append(lambda: _end(_not_met(args, settings), 1))
    _initialize(args, settings)
    if jax_distributed.global_state.num_processes == 1:
      yield None
      return
    hosts = Hosts(settings.heartbeat_timeout)
    verdict.append(hosts.aborted)
    yield from _together(hosts)


def _together(hosts: "Hosts") -> Iterator["Hosts"]:
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


def _end(line: str, code: int) -> None:
  """Ends this process now: its main thread may wait for ever for a process that is gone."""
  print(f"error: {line}", file=sys.stderr)
  leave(code)


def leave(code: int) -> None:
  """Ends this process without its clean-up, which would wait for the other processes."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


class Hosts:
  """The processes of this run, of which this is one.

  Attributes:
    index, count: number of this process, and of all.
    name: this process for messages.
    stopping: set once any process was told to stop.
    on_stop: is called then, by the watcher.
  """

  def __init__(self, heartbeat_timeout: int):
    state = jax_distributed.global_state
    self._client: Any = state.client
    self.index, self.count = state.process_id, state.num_processes
    self._address = str(state.coordinator_address)
    self._timeout, self._interval = heartbeat_timeout, min(5.0, heartbeat_timeout / 4)
    self.name = f"process {self.index} on {socket.gethostname()}"
    self.stopping, self._closing = threading.Event(), False
    self.on_stop: Callable[[], None] = lambda: None
    self._news = 0  # of which so many were heard
    self._beats: dict[int, tuple[str, float]] = {}
    self._lock = threading.Lock()  # of the next three
    self._calls, self._last, self._told = 0, None, False
    self._name_of_first = f"process 0 at {self._address}"
    self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)

  def start(self) -> None:
    """Tells the others this host's name and starts the watcher."""
    self._put(f"name/{self.index}", self.name)
    self._name_of_first = self._get("name/0", self._timeout)
    self._watcher.start()

  # The key-value store.

  def _put(self, key: str, value: str, overwrite: bool = False) -> None:
    self._client.key_value_set(f"{_PREFIX}/{key}", value, allow_overwrite=overwrite)

  def _get(self, key: str, seconds: float = _DAY) -> str:
    return self._client.blocking_key_value_get(f"{_PREFIX}/{key}", int(1000 * seconds))

  def _all(self, folder: str) -> dict[int, str]:
    """The values that the processes have put under `folder`/INDEX."""
    found = self._client.key_value_dir_get(f"{_PREFIX}/{folder}/")
    return {int(key.rpartition("/")[2]): value for key, value in found}

  def wait(self, name: str, seconds: float = _DAY) -> None:
    """Waits until every process has come to the place `name`; the watcher ends it if one cannot."""
    self._client.wait_at_barrier(f"{_PREFIX}/{name}", int(1000 * seconds))

  def of_first(self, key: str, value: Any) -> Any:
    """What process 0 gives as `value`, JSON; others may give anything."""
    if self.index == 0:
      self._put(key, json.dumps(value))
    return json.loads(self._get(key))

  def check_same_data(self, found: Mapping[str, inventory.Inventory]) -> None:
    """Raises UserError if this host sees other data than process 0; a collective."""
    inventory.check_same(found, self.of_first("data", to_json(found)))
    self.wait("the same data")

  # News: a sequence that all processes hear in one order.

  def _announce(self, **news: Any) -> None:
    for number in itertools.count(self._news):
      try:
        return self._put(f"news/{number}", json.dumps(news | {"process": self.index}))
      except jax.errors.JaxRuntimeError as e:
        if "ALREADY_EXISTS" not in str(e):
          raise

  def _watch(self) -> None:
    for beat in itertools.count():
      try:
        self._put(f"beat/{self.index}", str(beat), overwrite=True)
        if self.index == 0 and (silent := self._silent()) is not None:
          line = _lost(self._all("name").get(silent, f"process {silent}"), self._timeout)
          self._announce(line=line, code=cli.RUN_AGAIN, lost=silent)
        news = json.loads(self._get(f"news/{self._news}", self._interval))
      except jax.errors.JaxRuntimeError as e:
        if self._closing:
          return
        if "DEADLINE_EXCEEDED" not in str(e):
          self._first_is_lost()
          time.sleep(self._interval)
        continue
      self._news += 1
      if news.get("done"):
        return
      if news.get("stop"):
        self._stop()
      elif news["process"] != self.index or news["code"] == cli.RUN_AGAIN:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
          # Until all have heard it: process 0 holds the store.
          there = [i for i in range(self.count) if i != news.get("lost")]
          self._client.wait_at_barrier(f"{_PREFIX}/ended", 10_000, there)
        _end(news["line"], news["code"])

  def _silent(self) -> int | None:
    """The process of which nothing was heard for too long."""
    now, beats = time.monotonic(), self._all("beat")
    for index in range(self.count):
      beat = beats.get(index, "none")
      if self._beats.get(index, ("", 0.0))[0] != beat:
        self._beats[index] = beat, now
      elif now - self._beats[index][1] > self._timeout:
        return index
    return None

  def _first_is_lost(self) -> None:
    """Ends this process if process 0 does not answer."""
    if not self._closing and not self._reachable():
      if self.stopping.is_set():
        leave(cli.RUN_AGAIN)
      _end(_lost(self._name_of_first), cli.RUN_AGAIN)

  def _reachable(self) -> bool:
    host, _, port = self._address.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
      return False
    return True

  def aborted(self) -> None:
    """jax has lost process 0, or something else is wrong."""
    for _ in range(20 if self.index > 0 else 0):  # its port closes after its connections
      self._first_is_lost()
      time.sleep(0.1)

  # One failure for all.

  def fail(self, e: BaseException) -> str:
    """Tells the others why this process fails, so that they end too; returns the line.

    Where the loss of another process may be the cause, waits until that is known and ends.
    """
    caused = e
    while caused is not None and not isinstance(caused, jax.errors.JaxRuntimeError):
      caused = caused.__cause__
    if caused is not None and _OF_OTHERS.search(str(caused)):
      time.sleep(self._timeout + 3 * self._interval)
    line = f"{self.name}: {describe(e)}"
    code = cli.INTERRUPTED if isinstance(e, KeyboardInterrupt) else 1
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._announce(line=line, code=code)
      self.wait("ended", 10)
    atexit.register(leave, code)  # before jax's own, which would wait for the others
    return line

  def finish(self) -> None:
    """Waits until all processes are done."""
    self.wait("done")
    self._closing = True
    if self.index == 0:
      self._announce(done=True)
    self._watcher.join(2 * self._interval)

  # One stop for all.

  def stop(self) -> None:
    """Tells all processes to stop at the same call of `reached_stop`."""
    if not self.stopping.is_set():
      self._announce(stop=True)

  def _stop(self) -> None:
    with self._lock:
      if self._told:
        return
      self._told = True
      self._put(f"calls/{self.index}", str(self._calls))
    self.stopping.set()
    self.on_stop()

  def reached_stop(self) -> bool:
    """Whether all processes stop here. Every process calls it equally often, in one order.

    Each has told how often it had called before it heard of the stop. No process is past the next
    call after the last of these, because each waits here for the others' numbers.
    """
    with self._lock:
      self._calls += 1
      if not self._told:
        return False
    while self._last is None:
      calls = self._all("calls")
      if len(calls) == self.count:
        self._last = max(map(int, calls.values())) + 1
      else:
        time.sleep(0.05)
    return self._calls >= self._last


def _lost(name: str, seconds: int | None = None) -> str:
  silent = "does not answer" if seconds is None else f"was not heard of for {seconds} s"
  return (
    f"lost {name}, which {silent}: its machine, its network or the process itself has died; "
    "run the same command again on all hosts, it continues from the last checkpoint"
  )
