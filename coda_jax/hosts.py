"""Several processes, usually one a host, that are one run.

They talk through the key-value store of jax's coordination service, which process 0 holds. A thread
of each process, the watcher, sends signs of life and listens for news:

- the failure of one process ends all of them, with its line;
- a process that falls silent (killed, or its host or network died) ends the others with a line that
  names it, and exit code `RUN_AGAIN`;
- a signal to one process is known to all (`training/preemption.py`).
"""

import atexit
import contextlib
import itertools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import distributed as jax_distributed

from coda_jax import cli, outputs, storage
from coda_jax.config import to_json
from coda_jax.data import inventory
from coda_jax.errors import UserError, describe

_PREFIX = "coda_jax"  # of our keys
_DAY = 86400.0
SEEN = 60.0  # seconds in which network file systems show a new file to other hosts
# Failures of jax that the loss of another process may have caused.
_OF_OTHERS = re.compile(
  r"gloo|unavailable|deadline|connect|socket|barrier|aborted|cancel|unhealthy", re.IGNORECASE
)
_ending = threading.Lock()


def end(line: str, code: int) -> None:
  """Ends this process now: its main thread may wait for ever for a process that is gone."""
  with _ending:  # the watcher and jax's abort may both see the loss; the first one tells it
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
    self._own: tuple[str, int] | None = None  # line and exit code, once this process must end
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

  def check_shared(self, folder: storage.Path, option: str, *, wait: float = 0.0) -> None:
    """Makes a folder and raises UserError if this host does not see it; a collective.

    Args:
      option: what named the folder, for the message.
      wait: seconds to wait for another command that holds the folder.
    """
    with contextlib.ExitStack() as stack:
      if self.index == 0:
        stack.enter_context(outputs.locked(folder, option, wait=wait))
      self.wait(f"{option} is written")
      end = time.monotonic() + SEEN
      while not (folder / outputs.LOCK).exists():
        if time.monotonic() > end:
          raise UserError(
            f"{option}={folder} is not the folder that process 0 writes to; name a bucket, or a "
            "folder that all hosts share"
          )
        time.sleep(0.2)
      self.wait(f"{option} is shared")

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
      elif self._own is None:
        self._own = news["line"], news["code"]  # also if jax sees the end of process 0 before us
        with contextlib.suppress(jax.errors.JaxRuntimeError):
          # Until all have heard it: process 0 holds the store.
          there = [i for i in range(self.count) if i != news.get("lost")]
          self._client.wait_at_barrier(f"{_PREFIX}/ended", 20_000, there)
        end(*self._own)

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
    """Ends this process if process 0 does not answer, which may have ended because of this one."""
    if not self._closing and self._own is None and not self._reachable():
      if self.stopping.is_set():
        leave(cli.RUN_AGAIN)
      end(_lost(self._name_of_first), cli.RUN_AGAIN)

  def _reachable(self) -> bool:
    host, _, port = self._address.rpartition(":")
    try:
      socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError:
      return False
    return True

  def aborted(self) -> None:
    """jax has lost process 0, or something else is wrong."""
    if self._own is not None:
      end(*self._own)
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
    self._own = line, code
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._announce(line=line, code=code)
      self.wait("ended", 20)
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
