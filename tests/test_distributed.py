"""Several real processes: one failure for all, a lost host, a stop for all; no training here."""

import signal
import time

import pytest

from coda_jax import train
from tests import processes

PROGRAM = """
import os, signal, sys, time
from coda_jax import cli, config, distributed
from coda_jax.errors import UserError

class Late:
  # A client that is slow after a barrier: the others have ended when it goes on.
  def __init__(self, client):
    self.client = client
  def __getattr__(self, name):
    return getattr(self.client, name)
  def wait_at_barrier(self, *args):
    self.client.wait_at_barrier(*args)
    time.sleep(5)

def run(args):
  seconds = 8 if args.what in ("is killed", "breaks") else 60  # a busy machine is silent for long
  with distributed.joined(args, config.DistributedSettings(heartbeat_timeout=seconds)) as hosts:
    hosts.wait("begin")
    if args.what == "fails, late" and str(hosts.index) != args.who:
      hosts._client = Late(hosts._client)
    if str(hosts.index) == args.who:
      if args.what.startswith("fails"):
        raise UserError("photos: not on this host")
      if args.what == "is killed":
        os.kill(os.getpid(), signal.SIGKILL)
      if args.what == "breaks":
        os.abort()
    if args.what != "ends":
      time.sleep(60)  # as in a collective that the other never joins

parser = cli.Parser(prog="test")
parser.add_argument("--who")
parser.add_argument("--what")
distributed.add_flags(parser)
cli.main(run, parser)
"""


def run(what, who):
  """(exit codes, errors, seconds) of two processes of which one does something."""
  words = ["-c", PROGRAM, f"--what={what}", f"--who={who}"]
  begin = time.monotonic()
  with processes.started([[*words, *flags] for flags in processes.flags(2)]) as both:
    return *processes.ended(both, timeout=120), time.monotonic() - begin


@pytest.mark.parametrize("who", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", ["fails", pytest.param("fails, late", marks=pytest.mark.slow)])
def test_a_failure_of_one_process_ends_all_with_its_line(who, what):
  codes, errors, _ = run(what, who)
  assert codes == [1, 1], errors
  for error in errors:
    assert error.startswith(f"error: process {who} on ")
    assert error.endswith(": photos: not on this host") and error.count("\n") == 0


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_lost_process_is_named_by_the_other(who):
  codes, errors, seconds = run("is killed", who)
  assert codes[who] == -signal.SIGKILL and codes[1 - who] == 75, errors
  line = errors[1 - who]
  assert line.startswith(f"error: lost process {who} on ") and line.count("\n") == 0, line
  assert "run the same command again" in line and seconds < 100


@pytest.mark.slow
def test_processes_that_are_done_end_together():
  assert run("ends", 0)[:2] == ([0, 0], ["", ""])


@pytest.mark.slow
def test_an_abort_of_other_causes_is_one_line():
  codes, errors, _ = run("breaks", 1)
  assert codes == [75, -signal.SIGABRT]
  assert errors[1] == "error: aborted by a library's C++ code (--debug shows where)"


@pytest.mark.slow
def test_processes_that_do_not_meet(tmp_path):
  """Only one of two starts."""
  (tmp_path / "config.py").write_text(
    "import pathlib\n"
    "from coda_jax import config as c\n"
    "from tests.training import runs\n"
    "def get_config():\n"
    f"  return c.config_dict(runs.config(pathlib.Path({str(tmp_path)!r}),"
    " distributed__initialization_timeout=3))\n"
  )
  words = ["-m", "coda_jax.train", f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"]
  for flags in processes.flags(2):
    with processes.started([[*words, *flags]]) as one:
      codes, errors = processes.ended(one)
    assert codes == [1] and errors[0].count("\n") == 0
    assert errors[0].startswith("error: the 2 processes did not all meet within 3 s at localhost:")


@pytest.mark.parametrize(
  ("flags", "message"),
  [
    (["--coordinator=there"], "write HOST:PORT"),
    (["--coordinator=there:1", "--num-processes=2"], "belong together"),
    (["--coordinator=there:1", "--num-processes=2", "--process-id=2"], "they are 0 to 1"),
  ],
)
def test_wrong_flags(tmp_path, capsys, flags, message):
  with pytest.raises(SystemExit) as e:
    train.main(["--config=configs/demo.py", f"--workdir={tmp_path}", *flags])
  assert e.value.code == 2 and message in capsys.readouterr().err
