"""The command: killed, stopped and continued; bad input."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy

from coda_jax import outputs, train
from coda_jax.training.logging import read_metrics
from tests.training import runs

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = """
from coda_jax import config as c
from tests.training import runs
import pathlib

def get_config(arg="plain"):
  folder = pathlib.Path({folder!r})
  # Schedules do not depend on the number of steps, which some runs change.
  patchgan = c.AdversarialSettings(
    discriminator="patch", patch_width=4, patch_layers=1, ramp_steps=16,
    optimizer=c.OptimizerSettings(schedule_steps=16),
  )
  changes = {{"ema__start_epoch": 0, "eval__every": 8, "checkpoint__every": 4,
              "optimizer__schedule_steps": 16}}
  if arg == "plain":  # compiles in half the time
    changes |= {{"tokenizer__lora": None}}
  else:
    changes |= {{"adversarial": patchgan}}
  return c.config_dict(runs.config(folder, steps=16, **changes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("train")
  runs.make_inputs(folder)
  (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
  return folder


def start(folder, workdir, *overrides, arg="plain"):
  """Starts the command. All processes share compiled programs."""
  environment = os.environ | {
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
  }
  command = [sys.executable, "-m", "coda_jax.train", f"--config={folder}/config.py:{arg}"]
  return subprocess.Popen(
    [*command, f"--workdir={workdir}", *overrides],
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )


@contextlib.contextmanager
def killed_at_the_end(processes):
  """Leaves none of the processes behind, whatever happens."""
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def wait_for_step(process, workdir, step):
  file = workdir / "metrics.jsonl"
  while not (file.exists() and f'"step": {step},' in file.read_text()):
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.02)


def tokenizer(workdir):
  return safetensors.numpy.load_file(workdir / "tokenizer" / "model.safetensors")


def run_whole(folder, arg):
  """A run from its start to its end."""
  process = start(folder, folder / arg, arg=arg)
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors
  assert "step 16/16" in errors and "done:" in errors
  return folder / arg


@pytest.fixture(scope="module")
def whole(folder):
  return run_whole(folder, "plain")


def test_killed_and_stopped_runs_end_with_the_same_bits(folder, whole):
  broken = folder / "broken"
  process = start(folder, broken)
  wait_for_step(process, broken, 3)
  process.kill()  # while step 2 may still be being saved
  process.communicate()

  process = start(folder, broken)
  wait_for_step(process, broken, 4)
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 75, errors
  assert "stopped by a signal; saved step" in errors and not (broken / "tokenizer").exists()

  process = start(folder, broken)
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors
  assert "continuing" in errors
  ours, theirs = tokenizer(broken), tokenizer(whole)
  assert set(ours) == set(theirs)
  assert all((ours[k] == theirs[k]).all() for k in ours)
  ours, theirs = (sorted((r["kind"], r["step"]) for r in read_metrics(d)) for d in (broken, whole))
  assert ours == theirs


@pytest.mark.slow
def test_two_processes_compute_the_same(folder):
  """Half of each batch and of the parameters each, stopped by SIGTERM to one and continued.

  With adapters and a discriminator.
  """
  whole, workdir = run_whole(folder, "adversarial"), folder / "two"

  def start_both():
    with socket.socket() as s:
      s.bind(("localhost", 0))
      address = f"localhost:{s.getsockname()[1]}"
    flags = [f"--coordinator={address}", "--num-processes=2", "--config.mesh.fsdp=2"]
    flags += ["--config.steps=40"]  # so many that the signal comes before the last one
    processes = range(2)
    return [
      start(folder, workdir, *flags, f"--process-id={i}", arg="adversarial") for i in processes
    ]

  def finish(processes, code):
    errors = [p.communicate(timeout=600)[1] for p in processes]
    assert {p.returncode for p in processes} == {code}, errors
    return errors

  with killed_at_the_end(start_both()) as processes:
    wait_for_step(processes[0], workdir, 1)  # early: jax looks for signals once a second
    processes[1].send_signal(signal.SIGTERM)
    assert "stopped by a signal; saved step" in finish(processes, 75)[0]
  with killed_at_the_end(start_both()) as processes:
    assert "continuing" in finish(processes, 0)[0]
  theirs = {(r["kind"], r["step"]): r for r in read_metrics(whole)}
  ours = {(r["kind"], r["step"]): r for r in read_metrics(workdir)}
  assert {step for kind, step in ours if kind == "train"} == set(range(1, 41))
  both = [key for key in ours if key in theirs and key[1] <= 8]  # later rounding has grown
  assert len(both) == 8 + 2
  names = ("loss", "adaptive_weight", "disc_loss", "psnr", "quantization_error/level_2")
  for key in both:
    for name in set(names) & set(theirs[key]):
      expected = theirs[key][name]
      np.testing.assert_allclose(ours[key][name], expected, rtol=1e-3, err_msg=f"{key} {name}")


def fail(capsys, *argv):
  """(exit code, stderr) of the command run here."""
  with pytest.raises(SystemExit) as e:
    train.main(list(argv))
  return e.value.code, capsys.readouterr().err


def test_bad_input(folder, tmp_path, capsys):
  config = f"--config={folder}/config.py"
  with outputs.locked(tmp_path):
    code, err = fail(capsys, config, f"--workdir={tmp_path}")
  assert code == 1 and err.startswith(f"error: {tmp_path} is in use by process {os.getpid()} on ")

  code, err = fail(capsys, config, f"--workdir={tmp_path}", "--config.optimizer.lr=1")
  assert code == 2 and "no config key 'lr'" in err

  (tmp_path / "file").write_text("")
  code, err = fail(capsys, config, f"--workdir={tmp_path}/file/run")
  assert code == 1 and err.startswith(f"error: --workdir={tmp_path}/file/run cannot be written")
  assert err.count("\n") == 1

  (tmp_path / "other" / "checkpoints" / "4").mkdir(parents=True)
  fields = train.config.to_json(runs.config(folder, seed=5))
  (tmp_path / "other" / "config.json").write_text(json.dumps(fields))
  code, err = fail(capsys, config, f"--workdir={tmp_path}/other")
  assert code == 1 and "holds a run with another config" in err and "seed (there 5, here 0)" in err

  (tmp_path / "bare" / "checkpoints" / "4").mkdir(parents=True)
  code, err = fail(capsys, config, f"--workdir={tmp_path}/bare")
  assert code == 1 and "config.json is missing or damaged" in err and "restore it, or" in err

  code, err = fail(capsys, config, f"--workdir={tmp_path}/new", "--config.data.train=folder:/no")
  workdir, error = err.splitlines()
  assert code == 1 and workdir == f"workdir: {tmp_path}/new" and "/no does not exist" in error
  assert not any((tmp_path / "new").iterdir()), "a run that never began claims no workdir"

  code, err = fail(capsys, "--workdir=x")
  assert code == 2
