"""Processes that a command starts beside itself."""

import multiprocessing
import os
import threading


def die_with_parent() -> None:
  """Ends this process, started by `multiprocessing`, as soon as the one that started it is gone.

  Killed by a signal, the main process cannot stop those that it started.
  """
  parent = multiprocessing.parent_process()

  def wait():
    if parent is not None:
      parent.join()
      os._exit(1)

  threading.Thread(target=wait, daemon=True).start()
