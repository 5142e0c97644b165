import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.config import LoggingSettings
from coda_jax.errors import UserError
from coda_jax.training import logging

PLAIN = LoggingSettings(tensorboard=False)


def lines(workdir):
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_records(tmp_path):
  metrics = logging.Metrics(tmp_path, PLAIN, 0, {})
  metrics.write("train", 1, {"loss": 0.5, "levels": np.array([1.0, np.inf])})
  metrics.close()
  record = {"kind": "train", "step": 1, "loss": 0.5, "levels/level_1": 1.0, "levels/level_2": None}
  assert lines(tmp_path) == [record] == logging.read_metrics(tmp_path)


def test_continued_run_drops_later_records_and_a_line_cut_off(tmp_path):
  metrics = logging.Metrics(tmp_path, PLAIN, 0, {})
  for step in (1, 2, 3):
    metrics.write("train", step, {"loss": 0.0})
  metrics.write("eval", 2, {"psnr": 20.0})
  metrics.close()
  with (tmp_path / "metrics.jsonl").open("a") as f:
    f.write('{"kind": "tr')
  metrics = logging.Metrics(tmp_path, PLAIN, 2, {})
  steps = [[r["step"] for r in metrics.records(kind)] for kind in ("train", "eval")]
  assert steps == [[1, 2], [2]]
  metrics.close()
  assert [(r["kind"], r["step"]) for r in lines(tmp_path)] == [
    ("train", 1),
    ("train", 2),
    ("eval", 2),
  ]


def test_tensorboard(tmp_path):
  metrics = logging.Metrics(tmp_path, LoggingSettings(tensorboard=True), 0, {})
  metrics.write("train", 1, {"loss": 0.5})
  metrics.close()
  assert list((tmp_path / "tensorboard").iterdir())


def test_wandb(tmp_path, monkeypatch):
  """Started with the workdir's name, fed with prefixed names, finished."""
  calls = []
  run = types.SimpleNamespace(
    log=lambda values, step: calls.append((values, step)), finish=lambda: calls.append("finish")
  )
  fake = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or run)
  monkeypatch.setitem(sys.modules, "wandb", fake)
  settings = LoggingSettings(tensorboard=False, wandb_project="project")
  metrics = logging.Metrics(tmp_path, settings, 0, {"seed": 1})
  metrics.write("eval", 3, {"psnr": 20.0})
  metrics.close()
  logging.Metrics(tmp_path, settings, 3, {}).close()
  (tmp_path / "other" / tmp_path.name).mkdir(parents=True)
  logging.Metrics(tmp_path / "other" / tmp_path.name, settings, 0, {}).close()
  started, logged, finished, again, _, other, _ = calls
  assert again["id"] == started["id"] != other["id"] and other["name"] == started["name"]
  assert started["project"] == "project" and started["config"] == {"seed": 1}
  assert started["name"] == tmp_path.name
  assert logged == ({"eval/psnr": 20.0}, 3) and finished == "finish"


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(UserError, match="wandb is not installed"):
    logging.Metrics(tmp_path, LoggingSettings(tensorboard=False, wandb_project="project"), 0, {})


def test_progress_leaves_out_the_first_update_and_pauses(monkeypatch, caplog):
  now = [0.0]
  monkeypatch.setattr(logging.time, "perf_counter", lambda: now[0])
  progress = logging.Progress(0, 10, 4)
  now[0] = 100.0  # compiling
  progress.advance({"loss": jnp.zeros(())})
  for _ in range(2):
    now[0] += 1.0
    progress.advance({"loss": jnp.zeros(())})
  with progress.paused():
    now[0] += 50.0
  with caplog.at_level("INFO", "coda_jax"):
    rates = progress.report(3, {"loss": 0.25})
  assert rates == {"steps_per_second": 1.0, "images_per_second": 4.0}
  assert caplog.messages == ["step 3/10  1 step/s  4 images/s  loss 0.25"]
  progress.close()


def test_parameters():
  arrays = {"a.kernel": jnp.zeros((2, 3)), "a.bias": jnp.zeros(3)}
  summary = logging.parameter_summary({"trained": arrays, "frozen": {}})
  assert summary == "trained: 2 arrays, 9 parameters, 0.0 MiB"
  table = logging.parameter_table(arrays)
  assert "a.kernel" in table and "(2, 3)" in table
