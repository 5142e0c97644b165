"""The loop with a trainer of three numbers."""

import dataclasses
import math
import os
import pathlib
import resource
import signal
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import cli, sharding
from coda_jax.config import CheckpointSettings, LoggingSettings, MeshSettings
from coda_jax.errors import UserError
from coda_jax.training import loop
from coda_jax.training.logging import read_metrics
from coda_jax.training.maskgit_trainer import GeneratorState
from coda_jax.training.trainer import Trainer

CHECKPOINT = CheckpointSettings(every=2, keep=2, keep_best=1, best_metric="-distance")
LOGGING = LoggingSettings(every=2, tensorboard=False)


class Batches:
  """Batch s is drawn with seed s."""

  def __init__(self, step):
    self.step = step

  def __next__(self):
    rng = np.random.default_rng(self.step)
    self.step += 1
    return {"x": rng.normal(size=(1, 3)).astype(np.float32)}

  def close(self):
    pass


class Toy(Trainer):
  """Pulls three numbers to random ones; `before` runs ahead of each update."""

  shown = ("loss",)
  product = "numbers"
  steps_per_epoch = 1

  def __init__(self, steps=6, eval_every=0, before=lambda step: None):
    config = types.SimpleNamespace(
      seed=0,
      data=types.SimpleNamespace(batch_size=1, accumulation=1),
      eval=types.SimpleNamespace(batch_size=1, every=eval_every),
      mesh=MeshSettings(),
    )
    super().__init__(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))
    self.steps, self.before, self.exported = steps, before, None
    self._set_up({}, {})

  def _fresh_state(self, key, given):
    ballast = jax.random.normal(key, (10_000,))  # its checkpoints fill a disk
    x = {"x": jnp.ones(3), "ballast": ballast}
    return GeneratorState(jnp.zeros((), jnp.int32), x, {}, (), jnp.zeros(1), jnp.zeros(1))

  def _local_batches(self, start):
    return Batches(start)

  def _update(self, state, frozen, key, batch):
    x = 0.9 * state.params["x"] + 0.1 * batch["x"][0, 0]
    state = state.replace(step=state.step + 1, params=state.params | {"x": x})
    return state, {"loss": jnp.square(x).sum(), "parts": x}

  def step(self, state, batch):
    self.before(int(jax.device_get(state.step)))
    return super().step(state, batch)

  def inventory(self):
    return {}

  def metric_names(self):
    return ["distance"]

  def evaluate(self, state):
    return {"distance": float(jnp.abs(state.params["x"]).sum())}

  def export(self, state, workdir):
    self.exported = np.asarray(state.params["x"])


def run(trainer, workdir, checkpoint=CHECKPOINT):
  workdir.mkdir(exist_ok=True)
  return loop.run(trainer, workdir, checkpoint, LOGGING, {})


def kept(workdir):
  return {int(p.name) for p in (workdir / "checkpoints").iterdir()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """The result of an uninterrupted run."""
  trainer = Toy()
  assert run(trainer, tmp_path_factory.mktemp("reference") / "run")
  return trainer.exported


def test_interrupted_by_an_exception(tmp_path, reference):
  def fail(step):
    if step == 5:
      raise RuntimeError("power cut")

  with pytest.raises(RuntimeError, match="power cut"):
    run(Toy(before=fail), tmp_path)
  trainer = Toy()
  assert run(trainer, tmp_path)
  np.testing.assert_array_equal(trainer.exported, reference)
  steps = [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "train"]
  assert steps == [2, 4, 6]  # each once, though step 5 was done twice


def test_sigterm_saves_and_the_run_continues(tmp_path, reference):
  def terminate(step):
    if step == 2:
      os.kill(os.getpid(), signal.SIGTERM)

  previous = signal.getsignal(signal.SIGTERM)
  assert not run(Toy(before=terminate), tmp_path)
  assert signal.getsignal(signal.SIGTERM) is previous
  assert (tmp_path / "checkpoints" / "3").is_dir()
  trainer = Toy()
  assert run(trainer, tmp_path)
  np.testing.assert_array_equal(trainer.exported, reference)


def test_ctrl_c_saves_and_the_run_continues(tmp_path, reference, caplog):
  def interrupt(step):
    if step == 2:
      os.kill(os.getpid(), signal.SIGINT)
      # The next one ends the process at once.
      assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL

  previous = signal.getsignal(signal.SIGINT)
  with caplog.at_level("INFO", "coda_jax"), pytest.raises(KeyboardInterrupt):
    run(Toy(before=interrupt), tmp_path)
  assert "Ctrl-C again stops at once" in caplog.text and "saved step 3 of 6" in caplog.text
  assert signal.getsignal(signal.SIGINT) is previous
  assert kept(tmp_path) == {2, 3}
  trainer = Toy()
  assert run(trainer, tmp_path)
  np.testing.assert_array_equal(trainer.exported, reference)


@pytest.mark.parametrize("steps", [8, 4])  # within the run, and at its end
def test_a_signal_ends_an_evaluation(tmp_path, steps):
  class Slow(Toy):
    def evaluate(self, state):
      if int(state.step) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(600):
          self.check()
          time.sleep(0.1)
      return super().evaluate(state)

  started = time.monotonic()
  trainer = Slow(steps=steps, eval_every=4)
  assert not run(trainer, tmp_path)
  assert time.monotonic() - started < 30
  assert 4 in kept(tmp_path) and (trainer.exported is not None) == (steps == 4)
  trainer = Toy(steps=steps, eval_every=4)
  assert run(trainer, tmp_path)
  steps_of = [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "eval"]
  assert steps_of == list(range(0, steps + 1, 4))


class Fails(Toy):
  """Its evaluation cannot read an image."""

  fails_at = (4, 6)

  def evaluate(self, state):
    if int(state.step) in self.fails_at:
      raise UserError("photos/7.jpg cannot be read")
    return super().evaluate(state)


def test_an_evaluation_that_fails_costs_nothing(tmp_path, reference, caplog):
  trainer = Fails(eval_every=2)
  assert run(trainer, tmp_path)
  np.testing.assert_array_equal(trainer.exported, reference)
  assert kept(tmp_path) >= {4, 6}
  for step in (4, 6):
    assert f"step {step}: the evaluation failed and is left out: photos/7.jpg cann" in caplog.text
  assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "eval"] == [0, 2]
  assert run(Toy(eval_every=2), tmp_path)  # the last one is made up for
  assert [r["step"] for r in read_metrics(tmp_path) if r["kind"] == "eval"] == [0, 2, 6]


def test_an_evaluation_that_fails_at_the_start_ends_the_run(tmp_path):
  class AtOnce(Fails):
    fails_at = (0,)

  with pytest.raises(UserError, match="photos/7.jpg"):
    run(AtOnce(eval_every=2), tmp_path)


def test_a_state_is_saved_before_it_is_evaluated(tmp_path):
  class Killed(Toy):
    def evaluate(self, state):
      if int(state.step) == 3:
        raise SystemExit("the machine is gone")
      return super().evaluate(state)

  with pytest.raises(SystemExit):
    run(Killed(eval_every=3), tmp_path)
  assert 3 in kept(tmp_path)


def test_data_that_fail_cost_no_update(tmp_path, reference):
  class Lost(Toy):
    def _local_batches(self, start):
      batches = super()._local_batches(start)

      class Some(Batches):
        def __next__(self):
          if self.step == 5:
            raise UserError("the disk of the images is gone")
          return super().__next__()

      return Some(batches.step)

  with pytest.raises(UserError, match="is gone"):
    run(Lost(), tmp_path)
  assert 5 in kept(tmp_path)
  trainer = Toy()
  assert run(trainer, tmp_path)
  np.testing.assert_array_equal(trainer.exported, reference)


def test_a_metric_that_no_evaluation_measures(tmp_path):
  settings = CheckpointSettings(best_metric="-lpips")
  with pytest.raises(UserError, match="best_metric='-lpips': .* it measures distance"):
    run(Toy(), tmp_path, settings)
  assert not os.listdir(tmp_path), "before anything is made"
  run(Toy(), tmp_path, CheckpointSettings(best_metric="-lpips", keep_best=0))


def test_complete_run_exports_again(tmp_path, reference):
  run(Toy(), tmp_path)
  records = (tmp_path / "metrics.jsonl").read_text()
  trainer = Toy()
  assert run(trainer, tmp_path)
  np.testing.assert_array_equal(trainer.exported, reference)
  assert (tmp_path / "metrics.jsonl").read_text() == records


def test_parameters_are_listed(tmp_path, caplog):
  with caplog.at_level("INFO", "coda_jax"):
    run(Toy(), tmp_path)
  assert "trained: 2 arrays, 10,003 parameters, 0.0 MiB" in caplog.text
  assert "ballast" in (tmp_path / "parameters.txt").read_text()


def test_fewer_steps_than_done(tmp_path):
  run(Toy(), tmp_path)
  with pytest.raises(UserError, match="at step 6, past the 4 steps"):
    run(Toy(steps=4), tmp_path)


def test_more_steps(tmp_path):
  run(Toy(steps=4), tmp_path)
  trainer = Toy(steps=6)
  run(trainer, tmp_path)
  assert trainer.exported is not None
  assert read_metrics(tmp_path)[-2]["step"] == 6


def test_not_finite(tmp_path):
  class Diverges(Toy):
    def _update(self, state, frozen, key, batch):
      state, values = super()._update(state, frozen, key, batch)
      bad = jnp.where(state.step == 4, jnp.nan, 0.0)
      params = state.params | {"x": state.params["x"] + bad}
      return state.replace(params=params), values | {"parts": values["parts"] + bad}

  with pytest.raises(
    UserError, match="step 4: parts not finite; the checkpoint of step 2 is intact"
  ):
    run(Diverges(), tmp_path)
  trainer = Toy(steps=4)
  run(trainer, tmp_path)
  assert np.isfinite(trainer.exported).all()


@pytest.mark.parametrize(
  "room, message",
  [
    (200, "cannot write .*metrics.jsonl: "),
    (10_000, "cannot save .*; the last complete one is of step 2"),
  ],
)
def test_disk_full(tmp_path, reference, room, message, monkeypatch):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails with EFBIG instead
  monkeypatch.setattr(sys, "dont_write_bytecode", True)  # it would be cut, too

  def fill(step):
    if step == 3:  # the checkpoint of step 2 may still be being written
      while not (tmp_path / "checkpoints" / "2").is_dir():
        time.sleep(0.01)
      resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))

  try:
    with pytest.raises(UserError, match=message):
      run(Toy(before=fill), tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, previous)
  trainer = Toy()
  assert run(trainer, tmp_path)
  np.testing.assert_array_equal(trainer.exported, reference)


def test_evaluations_and_best_checkpoint(tmp_path):
  run(Toy(steps=8, eval_every=2), tmp_path)
  records = read_metrics(tmp_path)
  distances = {r["step"]: r["distance"] for r in records if r["kind"] == "eval"}
  assert list(distances) == [0, 2, 4, 6, 8]
  del distances[0]  # no checkpoint was saved there
  del distances[8]  # evaluated after the last save
  assert kept(tmp_path) == {6, 8, min(distances, key=distances.get)}
  train = [r for r in records if r["kind"] == "train"]
  assert {"loss", "parts/level_1", "parts/level_3", "steps_per_second"} <= set(train[0])


@pytest.mark.parametrize(
  "name", [*(pytest.param(n, marks=pytest.mark.slow) for n in ("mar", "flux")), "maskgit"]
)
def test_shipped_configs_keep_the_best(tmp_path, name):
  """Evaluations and checkpoints of the configs' intervals fall on different updates."""
  config = cli.load_config(str(pathlib.Path(__file__).parents[2] / "configs" / f"{name}.py"))
  every, evaluated = config.checkpoint.every, config.eval.every
  unit = math.gcd(every, evaluated) or every

  class Best(Toy):
    """The first evaluation within the run is its best."""

    def evaluate(self, state):
      return {"distance": float(state.step) + 10 * (int(state.step) == 0)}

  settings = dataclasses.replace(CHECKPOINT, every=every // unit, keep_best=1)
  best = evaluated // unit
  steps = 2 * max(best, settings.every) + 3
  run(Best(steps=steps, eval_every=best), tmp_path, settings)
  assert best in kept(tmp_path) if best else kept(tmp_path) == {steps - 1, steps}


def test_best_checkpoints_outlive_a_restart(tmp_path):
  class Second(Toy):
    def evaluate(self, state):
      return {"distance": abs(float(state.step) - 2)}

  run(Second(steps=4, eval_every=1), tmp_path)
  run(Second(steps=8, eval_every=1), tmp_path)
  assert kept(tmp_path) == {2, 7, 8}


def test_evaluation_cut_off_by_a_kill_is_made_up_for(tmp_path):
  run(Toy(steps=4, eval_every=4), tmp_path)
  file = tmp_path / "metrics.jsonl"
  lines = file.read_text().splitlines(keepends=True)
  assert '"eval"' in lines[-1]
  file.write_text("".join(lines[:-1]) + lines[-1][:10])  # a line that was being written
  run(Toy(steps=4, eval_every=4), tmp_path)
  assert file.read_text() == "".join(lines)
