import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import sharding
from coda_jax.config import CheckpointSettings, MeshSettings
from coda_jax.errors import UserError
from coda_jax.training.checkpoints import Checkpoints, abstract

SETTINGS = CheckpointSettings(keep=2, keep_best=1, best_metric="psnr")


def state(value):
  return {"x": jnp.full((8, 2), value, jnp.float32), "none": {}}


@pytest.fixture
def checkpoints(tmp_path):
  checkpoints = Checkpoints(tmp_path / "checkpoints", SETTINGS)
  yield checkpoints
  checkpoints.close()


def like(devices=1):
  mesh = sharding.make_mesh(MeshSettings(), jax.devices()[:devices])
  shardings = sharding.tree_shardings(state(0), mesh, ((r"x$", ("data", "")),))
  return abstract(state(0), shardings)


def test_saves_and_restores_on_other_devices(checkpoints):
  assert checkpoints.latest is None
  checkpoints.save(3, state(3.0))
  checkpoints.wait()
  assert checkpoints.latest == 3
  found = checkpoints.restore(like(devices=8))
  np.testing.assert_array_equal(found["x"], state(3.0)["x"])
  assert len(found["x"].devices()) == 8


def test_keeps_the_latest_and_the_best(checkpoints):
  for step, psnr in ((1, 10.0), (2, 30.0), (3, 20.0), (4, None), (5, 25.0)):
    checkpoints.save(step, state(float(step)), psnr and {"psnr": psnr, "ssim": 0.0})
  checkpoints.wait()
  assert checkpoints.steps == [2, 4, 5]
  assert checkpoints.restore(like(), 2)["x"][0, 0] == 2


def test_a_metric_that_no_evaluation_measures(checkpoints):
  with pytest.raises(UserError, match="best_metric names 'psnr', .*; it measures ssim"):
    checkpoints.save(1, state(1.0), {"ssim": 0.5})


def test_another_structure(checkpoints):
  checkpoints.save(1, state(1.0))
  checkpoints.wait()
  with pytest.raises(UserError, match="cannot read a checkpoint in .*/checkpoints"):
    checkpoints.restore(like() | {"y": jax.ShapeDtypeStruct((2,), jnp.float32)})
