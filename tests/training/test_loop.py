"""The loop with a trainer of three numbers."""

import os
import resource
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import sharding
from coda_jax.config import CheckpointSettings, LoggingSettings, MeshSettings
from coda_jax.errors import UserError
from coda_jax.training import loop
from coda_jax.training.logging import read_metrics

CHECKPOINT = CheckpointSettings(every=2, keep=2, keep_best=1, best_metric="-distance")
LOGGING = LoggingSettings(every=2, tensorboard=False)


class Batches:
  """Batch s is drawn with seed s."""

  def __init__(self, step):
    self.step, self.closed = step, False

  def __next__(self):
    rng = np.random.default_rng(self.step)
    self.step += 1
    return jax.device_put(rng.normal(size=3).astype(np.float32))

  def close(self):
    self.closed = True


class Toy:
  """Pulls three numbers to random ones; `before` runs ahead of each update."""

  shown = ("loss",)
  images_per_step = 1

  def __init__(self, steps=6, eval_every=0, before=lambda step: None):
    self.steps, self.eval_every, self.before = steps, eval_every, before
    self.mesh = sharding.make_mesh(MeshSettings(), jax.devices()[:1])
    self.placement = sharding.replicated(self.mesh)
    self.exported = None
    self._update = jax.jit(self._update_fn, donate_argnums=0)

  def initial_state(self):
    ballast = jax.random.normal(jax.random.key(0), (10_000,))  # its checkpoints fill a disk
    state = {"step": jnp.zeros((), jnp.int32), "x": jnp.ones(3), "ballast": ballast}
    return jax.device_put(state, self.placement)

  def abstract_state(self):
    def abstract(shape, dtype):
      return jax.ShapeDtypeStruct(shape, dtype, sharding=self.placement)

    ballast = abstract((10_000,), jnp.float32)
    return {"step": abstract((), jnp.int32), "x": abstract((3,), jnp.float32), "ballast": ballast}

  def overview(self, state):
    return "three numbers"

  def batches(self, step):
    return Batches(step)

  @staticmethod
  def _update_fn(state, batch):
    x = 0.9 * state["x"] + 0.1 * batch
    values = {"loss": jnp.square(x).sum(), "parts": x}
    return state | {"step": state["step"] + 1, "x": x}, values

  def step(self, state, batch):
    self.before(int(jax.device_get(state["step"])))
    return self._update(state, batch)

  def evaluate(self, state):
    return {"distance": float(jnp.abs(state["x"]).sum())}

  def export(self, state, workdir):
    self.exported = np.asarray(state["x"])


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
    @staticmethod
    def _update_fn(state, batch):
      state, values = Toy._update_fn(state, batch)
      bad = jnp.where(state["step"] == 4, jnp.nan, 0.0)
      return state | {"x": state["x"] + bad}, values | {"parts": values["parts"] + bad}

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
