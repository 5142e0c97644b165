"""Training over two real processes of 4 simulated devices each, against one process of 8."""

import json
import signal
import time

import numpy as np
import pytest

import coda_jax
from coda_jax.data import decode, sources
from coda_jax.training.logging import read_metrics
from tests import processes
from tests.training import runs, watched

CONFIG = """
import pathlib
from coda_jax import config as c
from tests.training import runs

def get_config(arg="plain"):
  changes = {{
    "eval__every": 3, "checkpoint__every": 2, "ema__start_epoch": 0,
    "optimizer__schedule_steps": 12, "adversarial__ramp_steps": 12,
    "adversarial__optimizer__schedule_steps": 12, "distributed__heartbeat_timeout": 10,
    "distributed__initialization_timeout": 120,
  }}
  if arg == "plain":  # compiles in half the time
    changes |= {{"tokenizer__lora": None}}
  else:
    changes |= {{"adversarial__discriminator": "patch", "adversarial__patch_width": 4,
                 "adversarial__patch_layers": 1}}
  return c.config_dict(runs.config(pathlib.Path({folder!r}), steps=6, **changes))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("hosts")
  runs.make_inputs(folder)
  (folder / "config.py").write_text(CONFIG.format(folder=str(folder)))
  return folder


def start(folder, workdir, count, *overrides, arg="plain"):
  """The command over `count` processes with 8 devices together."""
  workdir.mkdir(exist_ok=True)
  words = ["-m", "tests.training.watched", str(workdir), f"--config={folder}/config.py:{arg}"]
  words += [f"--workdir={workdir}/run", *overrides]
  several = processes.flags(count) if count > 1 else [[]]
  commands = [[*words, *flags] for flags in several]
  return processes.started(commands, cache=folder / f"cache{count}", devices=8 // count)


def finish(folder, workdir, count, *overrides, arg="plain"):
  with start(folder, workdir, count, *overrides, arg=arg) as started:
    codes, errors = processes.ended(started, timeout=600)
  assert set(codes) == {0}, errors
  return errors


def stop(started, who, signum=signal.SIGTERM):
  """(exit codes, errors, seconds) after a signal to one process."""
  begin = time.monotonic()
  started[who].send_signal(signum)
  return *processes.ended(started), time.monotonic() - begin


def wait_for(started, holds):
  while not holds():
    assert all(p.poll() is None for p in started), processes.ended(started)
    time.sleep(0.02)


def in_phase(workdir, name, process=0):
  file = workdir / f"phase-{process}"
  return lambda: file.is_file() and file.read_text() == name


def records(workdir):
  return {(r["kind"], r["step"]): r for r in read_metrics(workdir / "run")}


def checksums(workdir, step):
  file = workdir / "run" / "checkpoints" / str(step) / "_CHECKPOINT_METADATA"
  return json.loads(file.read_text())["custom_metadata"]["checksums"]


def ids(workdir, folder):
  """Of the held-out photos."""
  source = sources.open_source(f"folder:{folder}/images@val")
  photos = [decode.decode_image(source[i][0]) for i in range(6)]
  pixels = [decode.resize_and_crop(photo, 16, resize_ratio=1.125) for photo in photos]
  tokenizer = coda_jax.load_tokenizer(workdir / "run" / "tokenizer")
  return tokenizer.encode(np.stack(pixels).astype(np.float32) / 127.5 - 1)


@pytest.mark.slow
@pytest.mark.parametrize("arg", ["plain", "adversarial"])
def test_two_processes_compute_what_one_does(folder, arg):
  """Over data x fsdp and over model too, which here lies within a process and across both."""
  one = folder / f"one {arg}"
  finish(folder, one, 1, "--config.mesh.fsdp=2", arg=arg)
  for name, mesh in (("fsdp", ["fsdp=2"]), ("model", ["model=8", "data=1"])):
    if (name, arg) == ("model", "adversarial"):
      continue
    two = folder / f"two {arg} {name}"
    finish(folder, two, 2, *(f"--config.mesh.{m}" for m in mesh), arg=arg)
    ours, theirs = records(two), records(one)
    assert set(ours) == set(theirs) and len(ours) == 6 + 3
    for key in ours:
      loss = "loss" if key[0] == "train" else "psnr"
      np.testing.assert_allclose(ours[key][loss], theirs[key][loss], rtol=1e-4, err_msg=str(key))
    for a, b in zip(ids(two, folder), ids(one, folder), strict=True):
      np.testing.assert_array_equal(a, b)
    assert watched.images(two) == watched.images(one)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_hosts_takes_over(folder, before, after):
  """Each image is seen once an epoch: of 24, by 3 updates of 8."""
  workdir = folder / f"{before} then {after}"
  with start(folder, workdir, before, "--config.steps=30") as started:
    wait_for(started, lambda: (workdir / "run" / "metrics.jsonl").exists())
    wait_for(started, lambda: ("train", 2) in records(workdir))
    codes, errors, seconds = stop(started, before - 1)
  assert set(codes) == {75} and seconds < 30, errors
  assert "stopped by a signal; saved step" in errors[0]
  errors = finish(folder, workdir, after, "--config.steps=12")
  assert "continuing" in errors[0]
  assert [r["step"] for r in read_metrics(workdir / "run") if r["kind"] == "train"] == [
    *range(1, 13)
  ]
  seen = watched.images(workdir)
  assert sorted(seen) == list(range(12))
  for epoch in range(4):
    rows = sorted(row for update in range(3 * epoch, 3 * epoch + 3) for row in seen[update])
    assert rows == list(range(24))


@pytest.fixture(scope="module")
def undisturbed(folder):
  """The checksums of the last state of two processes that were left alone."""
  finish(folder, folder / "alone", 2)
  return checksums(folder / "alone", 6)


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_a_killed_host_ends_the_others_and_a_restart_goes_on_with_the_same_bits(
  folder, undisturbed, who
):
  workdir = folder / f"killed {who}"
  with start(folder, workdir, 2) as started:
    wait_for(started, lambda: (workdir / "run" / "metrics.jsonl").exists())
    wait_for(started, lambda: ("train", 3) in records(workdir))
    codes, errors, seconds = stop(started, who, signal.SIGKILL)
  assert codes[who] == -signal.SIGKILL and codes[1 - who] == 75 and seconds < 120
  (line,) = (x for x in errors[1 - who].splitlines() if x.startswith("error: "))
  assert line.startswith(f"error: lost process {who} on ")
  finish(folder, workdir, 2)
  assert checksums(workdir, 6) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["initial state", "evaluation", "export"])
def test_a_signal_stops_all_wherever_they_are(folder, undisturbed, phase):
  """The first evaluation and the update after it compile: nothing is cached here."""
  workdir = folder / phase
  with start(folder, workdir, 2) as started:
    wait_for(started, in_phase(workdir, phase, 1))
    codes, errors, seconds = stop(started, 1)
  assert set(codes) == {75} and seconds < 30, (errors, seconds)
  finish(folder, workdir, 2)
  assert checksums(workdir, 6) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("images", [0, 23])
def test_data_of_one_host_are_missing(folder, tmp_path, images):
  """Process 1 sees a folder of its own, which is empty or lacks an image."""
  own = tmp_path / "images" / "train" / "one"
  own.mkdir(parents=True)
  for i in range(images):
    (own / f"{i}.png").symlink_to(folder / "images" / "train" / "one" / f"{i}.png")
  words = ["-m", "coda_jax.train", f"--config={folder}/config.py", f"--workdir={tmp_path}/run"]
  first, second = processes.flags(2)
  second.append(f"--config.data.train=folder:{tmp_path}/images@train")
  with processes.started([[*words, *first], [*words, *second]], devices=4) as started:
    codes, errors = processes.ended(started)
  assert codes == [1, 1], errors
  for error in errors:
    line = error.splitlines()[-1]
    assert line.startswith("error: process 1 on ") and f"{tmp_path}/images" in line
  assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_a_workdir_that_is_not_shared(folder, tmp_path):
  """Process 1 has a folder of its own, as on the disk of each host."""
  program = "from coda_jax import hosts, train; hosts.SEEN = 1.0; train.main()"
  words = ["-c", program, f"--config={folder}/config.py"]
  commands = [
    [*words, f"--workdir={tmp_path}/{i}", *flags] for i, flags in enumerate(processes.flags(2))
  ]
  with processes.started(commands, devices=4) as started:
    codes, errors = processes.ended(started)
  assert codes == [1, 1], errors
  for error in errors:
    line = error.splitlines()[-1]
    assert line.startswith("error: process 1 on ")
    assert f"--workdir={tmp_path}/1 is not the folder that process 0 writes to" in line
