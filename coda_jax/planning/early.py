"""Compiles up to code generation, most of a compile's time, and reads what the compiler wrote.

By then the program is decided: fusions, layouts, schedule and the place of every array. What code
generation adds is not known: the code itself and some temporaries. libtpu has no such mode, so
another process compiles, and ends as soon as the compiler has dumped the optimized program and its
use of memory.
"""

import multiprocessing
import pathlib
import re
import tempfile
import time
from typing import Any

import jax

from coda_jax import config as c
from coda_jax.errors import UserError
from coda_jax.planning import chips, programs
from coda_jax.processes import die_with_parent

# What libtpu writes, in this order.
_PROGRAM, _MEMORY, _LAST = (
  f"*.after_optimizations{end}.txt"
  for end in ("", "-memory-usage-report", "_after_buffer_assignment")
)
_POLL = 0.5  # seconds


class CompilerError(Exception):
  """What the compiler said of a program that it does not take."""


def optimize(
  what: str, settings, topology: chips.Topology, tokenizer: c.TrainConfig | None
) -> tuple[str, int]:
  """(text of the optimized program, bytes of a device's arrays) of one of `programs.make`.

  Raises:
    CompilerError: it fails, as where the program does not fit.
    UserError: this libtpu does not write what is needed.
  """
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    arguments = _compile, what, settings, topology, tokenizer, folder
    process = multiprocessing.get_context("spawn").Process(target=_in_process, args=arguments)
    process.start()
    try:
      while process.is_alive() and not any(folder.glob(_LAST)):
        time.sleep(_POLL)
    finally:
      process.kill()
      process.join()
    if not any(folder.glob(_LAST)):
      error = folder / "error"
      if error.exists():
        raise CompilerError(error.read_text())
      raise UserError(
        f"the compiler ended with exit code {process.exitcode} before its program could be read; "
        "leave out --no-code"
      )
    files = [*folder.glob(_PROGRAM), *folder.glob(_MEMORY)]
    report = files[1].read_text() if len(files) == 2 else ""
    total = re.search(r"^Memory Space: default.*\nTotal bytes: (\d+)", report, re.M)
    if total is None:
      raise UserError("this libtpu's report of memory has another form; leave out --no-code")
    return files[0].read_text(), int(total[1])


def _in_process(compiler, *args) -> None:
  die_with_parent()
  compiler(*args)


def _compile(what: str, settings, topology, tokenizer, folder: pathlib.Path) -> None:
  """Compiles and dumps into the folder, there also what the compiler says if it fails."""
  jax.config.update("jax_platforms", "cpu")
  lowered = programs.make(what, settings, chips.devices(topology), tokenizer).lower()
  options: dict[str, Any] = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
  try:
    lowered.compile(compiler_options=options)
  except Exception as e:
    (folder / "error").write_text(f"{type(e).__name__}: {e}")
