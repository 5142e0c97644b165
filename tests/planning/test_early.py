"""What is read of a compiler that is stopped, with stand-ins for the compiler."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from coda_jax.errors import UserError
from coda_jax.planning import chips, early

REPORT = (
  "Memory Space: default (color=0)\nTotal bytes: {} (1KiB)\nMemory Space: vmem\nTotal bytes: 1\n"
)


def _write(folder: pathlib.Path, total: str) -> None:
  (folder / "module_1.jit.after_optimizations.txt").write_text("ENTRY")
  (folder / "module_1.jit.after_optimizations-memory-usage-report.txt").write_text(
    REPORT.format(total)
  )
  (folder / "module_1.jit.after_optimizations_after_buffer_assignment.txt").write_text("ENTRY")


def generates_code(what, settings, topology, tokenizer, folder):
  (folder / "module_0.jit.before_optimizations.txt").write_text("ENTRY other")
  _write(folder, "1024")
  time.sleep(600)


def refuses(what, settings, topology, tokenizer, folder):
  (folder / "error").write_text("RESOURCE_EXHAUSTED")


def writes_nothing(what, settings, topology, tokenizer, folder):
  pass


def writes_another_report(what, settings, topology, tokenizer, folder):
  _write(folder, "many")


def writes_no_report(what, settings, topology, tokenizer, folder):
  _write(folder, "1024")
  next(folder.glob("*report.txt")).unlink()


def optimize(monkeypatch, compiler):
  monkeypatch.setattr(early, "_compile", compiler)
  return early.optimize("update", None, chips.parse("v5e-4"), None)


def test_the_compiler_is_stopped_where_it_would_generate_code(monkeypatch):
  start = time.monotonic()
  assert optimize(monkeypatch, generates_code) == ("ENTRY", 1024)
  assert time.monotonic() - start < 300


def test_what_the_compiler_refuses(monkeypatch):
  with pytest.raises(early.CompilerError, match="RESOURCE_EXHAUSTED"):
    optimize(monkeypatch, refuses)


@pytest.mark.parametrize(
  ("compiler", "line"),
  [
    (writes_nothing, "exit code 0"),
    (writes_another_report, "another form"),
    (writes_no_report, "another form"),
  ],
)
def test_compilers_that_write_something_else(monkeypatch, compiler, line):
  with pytest.raises(UserError, match=f"{line}.*leave out --no-code"):
    optimize(monkeypatch, compiler)


def tells_its_number(what, settings, topology, tokenizer, folder):
  pathlib.Path(what).write_text(str(os.getpid()))
  time.sleep(600)


def test_the_compiler_ends_with_a_command_that_is_killed(tmp_path):
  file = tmp_path / "number"
  code = (
    "from coda_jax.planning import early\n"
    "from tests.planning import test_early\n"
    "if __name__ == '__main__':\n"
    "  early._compile = test_early.tells_its_number\n"
    f"  early.optimize({str(file)!r}, None, None, None)\n"
  )
  (tmp_path / "command.py").write_text(code)
  path = {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
  command = subprocess.Popen([sys.executable, tmp_path / "command.py"], env=os.environ | path)
  deadline = time.monotonic() + 300
  while not (file.exists() and file.read_text()):
    assert command.poll() is None and time.monotonic() < deadline
    time.sleep(0.1)
  number = int(file.read_text())
  command.send_signal(signal.SIGKILL)
  command.wait()
  while pathlib.Path(f"/proc/{number}").exists():
    assert time.monotonic() < deadline
    time.sleep(0.1)
