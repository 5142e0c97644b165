"""Names of topologies."""

import pytest

from coda_jax import config as c
from coda_jax import sharding
from coda_jax.errors import UserError
from coda_jax.planning import chips


@pytest.mark.parametrize(
  ("text", "name", "chip_count"),
  [
    ("v5e:8x8", "v5e:8x8", 64),
    ("v5e-16", "v5e:4x4", 16),
    ("v5litepod-8", "v5e:2x4", 8),
    ("V5E-256", "v5e:16x16", 256),
    ("v6e-1", "v6e:1x1", 1),
    ("v4-32", "v4:2x2x4", 16),  # of v4 and v5p the number counts cores
    ("v5p-64", "v5p:2x4x4", 32),
    ("tpu7x:2x2x1", "tpu7x:2x2x1", 4),
  ],
)
def test_names(text, name, chip_count):
  topology = chips.parse(text)
  assert str(topology) == name and topology.chips == chip_count


def test_several_slices():
  topology = chips.parse("v5e-16", slices=2)
  assert str(topology) == "2 x v5e:4x4" and topology.chips == 32


@pytest.mark.parametrize(
  "text",
  ["", "v5e", "v5e:", "v9-8", "v5e-5", "v5e:2x2x2", "v4:2x2", "v5e:0x4", "tpu7x-8", "v5e:8*8"],
)
def test_other_names_are_one_line_with_the_known_forms(text):
  with pytest.raises(UserError, match="v5e:8x8.*v5litepod-16") as e:
    chips.parse(text)
  assert "\n" not in str(e.value)


def test_without_libtpu(monkeypatch):
  monkeypatch.setattr(chips, "has_libtpu", lambda: False)
  with pytest.raises(UserError, match=r"pip install 'coda_jax\[tpu\]'"):
    chips.devices(chips.parse("v5e-4"))


@pytest.mark.skipif(not chips.has_libtpu(), reason="libtpu is not installed (extra `tpu`)")
@pytest.mark.parametrize(
  ("text", "slices", "count"),
  [("v5e:1x1", 1, 1), ("v4:2x2x1", 1, 4), ("v5p-8", 1, 4), ("tpu7x:2x2x1", 1, 8), ("v6e-4", 2, 8)],
)
def test_devices(text, slices, count):
  topology = chips.parse(text, slices)
  assert len(chips.devices(topology)) == count == topology.chips * topology.chip.halves


@pytest.mark.skipif(not chips.has_libtpu(), reason="libtpu is not installed (extra `tpu`)")
def test_a_shape_that_no_host_has():
  with pytest.raises(UserError, match="v5e:3x2: libtpu refuses it"):
    chips.devices(chips.parse("v5e:3x2"))


@pytest.mark.skipif(not chips.has_libtpu(), reason="libtpu is not installed (extra `tpu`)")
def test_a_mesh_over_slices():
  """Only the data axis crosses the network between slices."""
  devices = chips.devices(chips.parse("v5e-4", slices=2))
  mesh = sharding.make_mesh(c.MeshSettings(fsdp=2), devices)
  assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "model": 1}
  of = [[d.slice_index for d in row.flat] for row in mesh.devices]
  assert of == [[0, 0], [0, 0], [1, 1], [1, 1]]
  with pytest.raises(UserError, match="data=1 is not a multiple of the 2 slices"):
    sharding.make_mesh(c.MeshSettings(data=1, fsdp=-1), devices)
