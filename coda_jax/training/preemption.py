"""A run that is told to stop: SIGTERM, a cloud's preemption notice, Ctrl-C."""

import contextlib
import logging
import multiprocessing
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from coda_jax import cli
from coda_jax.hosts import Hosts, leave

log = logging.getLogger("coda_jax")
GRACE = 10.0  # seconds that the main thread has to see a signal


class Stopped(BaseException):
  """A signal ended an evaluation."""


class Preemption:
  """Whether this run was told to stop, agreed on by all processes.

  The main thread asks after each update and between the batches of an evaluation. Where it cannot,
  because something compiles or is read for longer than `GRACE`, a thread ends the process, once
  nothing would be lost. A second Ctrl-C ends the process at once.

  Attributes:
    may_leave: nothing would be lost or half written if the process ended now.
  """

  def __init__(self):
    self.may_leave = True  # before the first update
    self._settle: Callable[[], None] = lambda: None
    self._previous: dict[int, Any] = {}  # handlers
    self._received, self._closed = 0, threading.Event()
    self._leaving: threading.Thread | None = None
    self._hosts: Hosts | None = None

  def __enter__(self):
    if threading.current_thread() is threading.main_thread():
      self._take(signal.SIGTERM)
      # A handler of Python runs between two instructions of Python. The thread sees the signal
      # while the main thread is in a compiler.
      self._reader, self._writer = socket.socketpair()
      self._writer.setblocking(False)
      self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
      self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
      self._listener.start()
    return self

  def _take(self, signum: signal.Signals) -> None:
    self._previous[signum] = signal.signal(signum, self._receive)

  def begin(self, settle: Callable[[], None]) -> None:
    """The run begins: from now on Ctrl-C too stops it where all is saved.

    Args:
      settle: ends a save that has begun.
    """
    self._settle = settle
    if self._previous:
      self._take(signal.SIGINT)

  def attach(self, hosts: Hosts | None) -> None:
    """From now on the processes stop together."""
    self._hosts = hosts
    if hosts is not None:
      hosts.on_stop = self._start_leaving
      if self._received:
        hosts.stop()

  def _receive(self, signum, frame):
    self._received = signum
    if signum == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      log.info("stopping after this update; Ctrl-C again stops at once, with the last checkpoint")

  def _listen(self) -> None:
    with contextlib.suppress(OSError):  # closed
      while number := self._reader.recv(1):
        if number[0] in self._previous:
          self._received = number[0]
          self._start_leaving()
          if self._hosts is not None:
            self._hosts.stop()

  def _start_leaving(self) -> None:
    if self._leaving is None:
      self._leaving = threading.Thread(target=self._leave, name="leaving", daemon=True)
      self._leaving.start()

  def _leave(self) -> None:
    """Ends the process if the main thread stays where nothing would be lost."""
    since = time.monotonic()
    while not self._closed.wait(0.1):
      if not self.may_leave:
        since = time.monotonic()
      elif time.monotonic() - since > GRACE:
        break
    else:
      return
    with contextlib.suppress(Exception):
      self._settle()
      if self._hosts is not None:
        self._hosts.wait("leaving", 20)
    if self._closed.is_set():
      return
    log.info("stopped by a signal; all that was done is saved")
    for child in multiprocessing.active_children():
      child.kill()
    leave(cli.INTERRUPTED if self.interrupted else cli.RUN_AGAIN)

  def requested(self) -> bool:
    """Whether to stop here; every process asks equally often."""
    return bool(self._received) if self._hosts is None else self._hosts.reached_stop()

  def check(self) -> None:
    """Raises Stopped if it is `requested`."""
    if self.requested():
      raise Stopped

  @property
  def interrupted(self) -> bool:
    """Whether the signal was Ctrl-C."""
    return self._received == signal.SIGINT

  def __exit__(self, *exc):
    self._closed.set()
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
    if self._previous:
      signal.set_wakeup_fd(self._wakeup)
      self._writer.close()
      self._listener.join(timeout=1)
      self._reader.close()
    if self._leaving is not None:
      self._leaving.join(timeout=1)
