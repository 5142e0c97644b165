import contextlib
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import sharding
from coda_jax.config import CheckpointSettings, MeshSettings
from coda_jax.errors import UserError
from coda_jax.training.checkpoints import Checkpoints, abstract, read_averages

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
  step, found = checkpoints.restore(like(devices=8))
  assert step == 3
  np.testing.assert_array_equal(found["x"], state(3.0)["x"])
  assert len(found["x"].devices()) == 8


def test_keeps_the_latest_and_the_best(checkpoints):
  for step, psnr in ((1, 10.0), (2, 30.0), (3, 20.0), (4, None), (5, 25.0)):
    checkpoints.save(step, state(float(step)))
    checkpoints.evaluated(step, {"psnr": psnr, "ssim": 0.0})
  checkpoints.wait()
  assert checkpoints.steps == [2, 4, 5]


def test_another_structure(checkpoints):
  checkpoints.save(1, state(1.0))
  checkpoints.wait()
  with pytest.raises(
    UserError, match="checkpoints 1 in .*/checkpoints are damaged or of another version"
  ):
    checkpoints.restore(like() | {"y": jax.ShapeDtypeStruct((2,), jnp.float32)})
  assert checkpoints.latest == 1, "what was never read again is not set aside"


def test_averages_are_read_of_every_checkpoint(tmp_path):
  assert read_averages(tmp_path / "none", "quantizer.") == {}
  with contextlib.closing(Checkpoints(tmp_path, SETTINGS)) as checkpoints:
    for step in (1, 2):
      names = {"quantizer.a": float(step), "quantizer.b": 5.0, "vae.c": 6.0}
      ema = {name: jnp.full((3,), value) for name, value in names.items()}
      checkpoints.save(step, {"ema": ema, "params": {"quantizer.a": jnp.zeros(3)}, "none": {}})
  found = read_averages(tmp_path, "quantizer.")
  assert list(found) == [1, 2] and set(found[2]) == {"quantizer.a", "quantizer.b"}
  np.testing.assert_array_equal(found[1]["quantizer.a"], np.ones(3))
  np.testing.assert_array_equal(found[2]["quantizer.a"], np.full(3, 2.0))


def _files(folder):
  return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def _flip(file):
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def _damages(folder):
  """(what happened to a checkpoint, a function that does it) of every file, and of the folder."""
  for name in _files(folder):
    yield f"{name} is gone", lambda f, n=name: (f / n).unlink()
    yield f"{name} is empty", lambda f, n=name: (f / n).write_bytes(b"")
    half = lambda f, n=name: (f / n).write_bytes(
      (f / n).read_bytes()[: (f / n).stat().st_size // 2]
    )
    yield f"{name} is cut off", half
    yield f"{name} has another bit", lambda f, n=name: _flip(f / n)
    yield f"{name} is noise", lambda f, n=name: (f / n).write_bytes(bytes(range(256)))
  yield "the folder is empty", lambda f: (shutil.rmtree(f), f.mkdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax's
def test_damaged_checkpoints_are_set_aside(tmp_path):
  """Every file of the newest checkpoint, damaged in every way: it is read right, or set aside."""

  def noise(step):
    values = np.random.default_rng(step).normal(size=(256, 16))
    return {"x": jnp.asarray(values, jnp.float32), "none": {}}

  def like():
    mesh = sharding.make_mesh(MeshSettings(), jax.devices()[:1])
    return abstract(noise(1), sharding.tree_shardings(noise(1), mesh, ()))

  whole = Checkpoints(tmp_path / "whole", SETTINGS)
  for step in (1, 2):
    whole.save(step, noise(step))
  whole.close()
  aside = 0
  for i, (what, damage) in enumerate(_damages(tmp_path / "whole" / "2")):
    folder = tmp_path / str(i)
    shutil.copytree(tmp_path / "whole", folder)
    damage(folder / "2")
    checkpoints = Checkpoints(folder, SETTINGS)
    step, found = checkpoints.restore(like())
    np.testing.assert_array_equal(found["x"], noise(step)["x"], err_msg=what)
    if step == 1:
      aside += 1
      assert (folder / "2.damaged").is_dir()
      checkpoints.save(2, noise(2))
      checkpoints.wait()
      assert checkpoints.restore(like())[0] == 2
    checkpoints.close()
  assert aside > 15
  gc.collect()  # of the coroutines that failed, here and in no other test
