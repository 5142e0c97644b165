"""The command: killed, stopped and continued; bad input."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import safetensors.numpy

from coda_jax import config, outputs, train
from coda_jax.training.logging import read_metrics
from tests.training import runs

ROOT = pathlib.Path(__file__).parent.parent
CONFIG = """
from coda_jax import config as c
from tests.training import runs
import pathlib

def get_config():
  folder = pathlib.Path({folder!r})
  changes = {{"tokenizer__lora": None, "ema__start_epoch": 0, "eval__every": 8,
              "checkpoint__every": 4}}
  return c.config_dict(runs.config(folder, steps=16, **changes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("train")
  runs.make_inputs(folder)
  (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
  return folder


def start(folder, workdir, *overrides):
  """Starts the command. All processes share compiled programs."""
  environment = os.environ | {
    "XLA_FLAGS": "",
    "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "PYTHONPATH": str(ROOT),
  }
  command = [sys.executable, "-m", "coda_jax.train", f"--config={folder}/config.py"]
  return subprocess.Popen(
    [*command, f"--workdir={workdir}", *overrides],
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_for_step(process, workdir, step):
  file = workdir / "metrics.jsonl"
  while not (file.exists() and f'"step": {step},' in file.read_text()):
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.02)


def tokenizer(workdir):
  return safetensors.numpy.load_file(workdir / "tokenizer" / "model.safetensors")


def run_whole(folder):
  """The workdir of a run from its start to its end."""
  process = start(folder, folder / "whole")
  _, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors
  assert "step 16/16" in errors and "done:" in errors
  return folder / "whole"


@pytest.fixture(scope="module")
def whole(folder):
  return run_whole(folder)


@pytest.mark.slow
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


def fail(capsys, *argv):
  """(exit code, stderr) of the command run here."""
  with pytest.raises(SystemExit) as e:
    train.main(list(argv))
  return e.value.code, capsys.readouterr().err


def test_bad_input(folder, tmp_path, capsys):
  spec = f"--config={folder}/config.py"
  with outputs.locked(tmp_path):
    code, err = fail(capsys, spec, f"--workdir={tmp_path}")
  assert code == 1 and err.startswith(f"error: {tmp_path} is in use by process {os.getpid()} on ")

  code, err = fail(capsys, spec, f"--workdir={tmp_path}", "--config.optimizer.lr=1")
  assert code == 2 and "no config key 'lr'" in err

  (tmp_path / "file").write_text("")
  code, err = fail(capsys, spec, f"--workdir={tmp_path}/file/run")
  assert code == 1 and err.startswith(f"error: --workdir={tmp_path}/file/run cannot be written")
  assert err.count("\n") == 1

  (tmp_path / "other" / "checkpoints" / "4").mkdir(parents=True)
  fields = config.to_json(runs.config(folder, seed=5))
  (tmp_path / "other" / "config.json").write_text(json.dumps(fields))
  code, err = fail(capsys, spec, f"--workdir={tmp_path}/other")
  assert code == 1 and "holds a run with another config" in err and "seed (there 5, here 0)" in err

  (tmp_path / "bare" / "checkpoints" / "4").mkdir(parents=True)
  code, err = fail(capsys, spec, f"--workdir={tmp_path}/bare")
  assert code == 1 and "config.json is missing or damaged" in err and "restore it, or" in err

  code, err = fail(capsys, spec, f"--workdir={tmp_path}/new", "--config.data.train=folder:/no")
  workdir, error = err.splitlines()
  assert code == 1 and workdir == f"workdir: {tmp_path}/new" and "/no does not exist" in error
  assert not any((tmp_path / "new").iterdir()), "a run that never began claims no workdir"

  code, err = fail(capsys, "--workdir=x")
  assert code == 2
