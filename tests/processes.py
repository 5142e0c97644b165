"""Several processes of a command on this machine, joined as hosts of a pod are."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def environment(cache: pathlib.Path | None = None, devices: int = 1) -> dict[str, str]:
  """Of a process with simulated devices. Processes with one `cache` share compiled programs."""
  compiled = {
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
  }
  return (
    os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "PYTHONPATH": str(ROOT),
    }
    | (compiled if cache else {})
  )


def flags(count: int) -> list[list[str]]:
  """The flags of each of `count` processes, with a port that is free."""
  with socket.socket() as s:
    s.bind(("localhost", 0))
    address = f"localhost:{s.getsockname()[1]}"
  common = [f"--coordinator={address}", f"--num-processes={count}"]
  return [[*common, f"--process-id={i}"] for i in range(count)]


@contextlib.contextmanager
def started(commands, **environments):
  """Starts the Python commands (words after `python`) and leaves none of them behind.

  Args:
    environments: for `environment`.
  """
  processes = [
    subprocess.Popen(
      [sys.executable, *words],
      env=environment(**environments),
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
    )
    for words in commands
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def ended(processes, timeout: float = 300) -> tuple[list[int], list[str]]:
  """(exit codes, what each wrote to stderr)."""
  errors = [p.communicate(timeout=timeout)[1] for p in processes]
  lines = ["\n".join(x for x in e.splitlines() if not x.startswith("[Gloo]")) for e in errors]
  return [p.returncode for p in processes], lines
