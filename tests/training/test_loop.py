"""The loop with a trainer of three numbers."""

import os
import resource
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import sharding
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

  def evaluate(self, state):
    return {"distance": float(jnp.abs(state.params["x"]).sum())}

  def export(self, state, workdir):
    self.exported = np.asarray(state.params["x"])


def run(trainer, workdir):
  workdir.mkdir(exist_ok=True)
  return loop.run(trainer, workdir, CHECKPOINT, LOGGING, {})


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
  [(200, "cannot write .*metrics.jsonl: "), (10_000, "cannot save .*; .* step 2 is intact")],
)
def test_disk_full(tmp_path, reference, room, message):
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails with EFBIG instead

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
  best = min(distances, key=distances.get)
  kept = {int(p.name) for p in (tmp_path / "checkpoints").iterdir()}
  assert kept == {6, 8, best}
  train = [r for r in records if r["kind"] == "train"]
  assert {"loss", "parts/level_1", "parts/level_3", "steps_per_second"} <= set(train[0])


def test_evaluation_cut_off_by_a_kill_is_made_up_for(tmp_path):
  run(Toy(steps=4, eval_every=4), tmp_path)
  file = tmp_path / "metrics.jsonl"
  lines = file.read_text().splitlines(keepends=True)
  assert '"eval"' in lines[-1]
  file.write_text("".join(lines[:-1]) + lines[-1][:10])  # a line that was being written
  run(Toy(steps=4, eval_every=4), tmp_path)
  assert file.read_text() == "".join(lines)
