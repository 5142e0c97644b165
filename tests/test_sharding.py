import inspect
import types

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from coda_jax import sharding
from coda_jax.config import MeshSettings
from coda_jax.errors import UserError

RULES = ((r"\.kernel$", ("", "", "", "fsdp")), (r"codebook$", ("model", "")))


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshSettings(data=2, fsdp=2, model=2))


def test_the_rest_of_the_devices():
  assert dict(sharding.make_mesh(MeshSettings(fsdp=2)).shape) == {"data": 4, "fsdp": 2, "model": 1}


def test_devices_must_fit():
  with pytest.raises(UserError, match="data=3, fsdp=1, model=1 do not multiply to the 8 devices"):
    sharding.make_mesh(MeshSettings(data=3))


@pytest.mark.parametrize(
  ("path", "shape", "spec"),
  [
    ("a.kernel", (3, 3, 4, 8), (None, None, None, "fsdp")),
    ("a.kernel", (3, 3, 4, 7), (None,) * 4),  # an axis that does not divide is left out
    ("a.kernel", (4, 8), ()),  # of another number of dimensions
    ("quantizer.codebook", (64, 16), ("model", None)),
    ("a.bias", (8,), ()),
  ],
)
def test_rules(mesh, path, shape, spec):
  assert sharding.spec_for(path, shape, mesh, RULES) == PartitionSpec(*spec)


def test_trees_follow_the_rules(mesh):
  tree = {"params": {"quantizer.codebook": np.zeros((64, 16))}, "step": np.zeros(())}
  found = sharding.tree_shardings(tree, mesh, RULES)
  assert found["params"]["quantizer.codebook"].spec == PartitionSpec("model", None)
  assert found["step"].spec == PartitionSpec()


def test_batches_must_divide(mesh):
  sharding.check_batch("a batch", 8, mesh)
  with pytest.raises(UserError, match="a batch is 6 images; the mesh splits it over 4 devices"):
    sharding.check_batch("a batch", 6, mesh)


@pytest.mark.parametrize(
  ("shape", "devices", "parts"),
  [
    ((4, 1, 2), [0, 0, 0, 0, 1, 1, 1, 1], [[0], [1]]),
    ((2, 2, 2), [0, 0, 1, 1, 0, 0, 1, 1], [[0], [1]]),  # a part need not be in one piece
    ((1, 1, 8), [0, 0, 0, 0, 1, 1, 1, 1], [[0, 1]]),
    ((2, 1, 4), [0, 0, 1, 1, 2, 2, 3, 3], [[0, 1], [2, 3]]),
  ],
)
def test_processes_along_model_read_the_same_images(shape, devices, parts):
  devices = [types.SimpleNamespace(process_index=i) for i in devices]
  mesh = types.SimpleNamespace(
    devices=np.array(devices).reshape(shape), shape=dict(zip(sharding.AXES, shape, strict=True))
  )
  assert inspect.unwrap(sharding.batch_parts)(mesh) == parts


def test_processes_that_share_part_of_their_images():
  devices = [types.SimpleNamespace(process_index=i) for i in [0, 0, 0, 0, 1, 1, 1, 1]]
  mesh = types.SimpleNamespace(
    devices=np.array(devices[:6]).reshape(2, 1, 3), shape={"data": 2, "fsdp": 1, "model": 3}
  )
  with pytest.raises(UserError, match="config.mesh: model=3 cuts the devices of a host"):
    inspect.unwrap(sharding.batch_parts)(mesh)


class Local:
  def __init__(self):
    self.closed = False

  def __next__(self):
    return {"image": np.arange(16.0).reshape(16, 1), "index": np.arange(16)}

  def close(self):
    self.closed = True


def test_global_batches(mesh):
  local = Local()
  batches = sharding.GlobalBatches(local, mesh, accumulation=2, pick=lambda b: b["image"])
  images = next(batches)
  np.testing.assert_array_equal(images, np.arange(16.0).reshape(2, 8, 1))
  assert images.sharding.spec == PartitionSpec(None, ("data", "fsdp"))
  assert images.addressable_shards[0].data.shape == (2, 2, 1)
  batches.close()
  assert local.closed


def test_gather(mesh):
  split = jax.device_put(np.arange(8.0), sharding.batch_sharding(mesh))
  (whole,) = jax.tree.leaves(sharding.gather({"x": split}, mesh))
  assert whole.sharding.is_fully_replicated
  np.testing.assert_array_equal(whole, np.arange(8.0))
