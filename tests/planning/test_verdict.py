"""What fits, what makes it fit, and how large a batch may be."""

import pytest

from coda_jax import config as c
from coda_jax.planning import compiling, table, verdict
from coda_jax.planning.chips import GIB, parse
from tests.training import runs


@pytest.mark.parametrize("start", [1, 3, 8, 100])
@pytest.mark.parametrize("most", [0, 1, 5, 8, 31])
def test_the_largest_that_fits(start, most):
  tried = []

  def fits(n):
    tried.append(n)
    return n <= most

  assert verdict.largest(fits, start) == most
  assert len(tried) == len(set(tried)) < 14
  assert verdict.largest(lambda n: True, start, most=64) == 64


@pytest.fixture
def settings(tmp_path):
  return runs.config(tmp_path, data__batch_size=32, eval__batch_size=16)


DEVICES = [None] * 4  # their number alone counts


@pytest.fixture(autouse=True)
def _no_mesh(monkeypatch):
  monkeypatch.setattr(verdict, "shards", lambda settings, devices: len(devices))


def test_remedies(settings):
  found = dict(verdict.remedies("update", settings, DEVICES))
  assert found == {
    "remat": [{"remat": "blocks"}],
    "mesh": [{"mesh__data": -1, "mesh__fsdp": 4}],
    "batch": [{"data__accumulation": n} for n in (2, 4, 8)],
  }
  done = verdict.changed(settings, remat="blocks", mesh__fsdp=2, data__accumulation=8)
  assert not dict(verdict.remedies("update", done, DEVICES))
  found = dict(verdict.remedies("eval", settings, DEVICES))
  assert found["batch"] == [{"eval__batch_size": n} for n in (8, 4)] and "remat" not in found


def test_remedies_of_a_generator():
  settings = c.MaskGITTrainConfig(data=c.TokenDataSettings(tokenizer="t", train="t"))
  assert dict(verdict.remedies("update", settings, DEVICES))["remat"] == [{"remat": True}]
  assert [name for name, _ in verdict.remedies("sample", settings, DEVICES)] == ["batch"]


def test_each_remedy_is_tried_by_itself(settings):
  tried, told = [], []

  def measure(changed):
    tried.append((changed.remat, changed.mesh.fsdp, changed.data.accumulation))
    return {"fits": changed.data.accumulation >= 4 or changed.mesh.fsdp > 1, "needs": 1.0}

  rows = verdict.try_remedies("update", settings, DEVICES, measure, told.append)
  assert tried == [("blocks", 1, 1), ("none", 4, 1), ("none", 1, 2), ("none", 1, 4)]
  assert [(r["remedy"], r["fits"]) for r in rows] == [
    ("remat", False),
    ("mesh", True),
    ("batch", True),
  ]
  assert rows[2]["flags"] == "--config.data.accumulation=4" and len(told) == 4
  result = {"fits": False, "needs": 20 * GIB, "limit": 15.75 * GIB, "remedies": rows}
  assert table.verdict(result) == (
    "does not fit: needs 20.000 GiB of 15.750 GiB; it fits with "
    "--config.mesh.data=-1 --config.mesh.fsdp=4 or with --config.data.accumulation=4"
  )
  nothing = result | {"needs": None, "remedies": rows[:1]}
  assert table.verdict(nothing).startswith("does not fit: needs ? of")
  assert table.verdict(nothing).endswith("it fits with none of what was tried")


def test_a_search_compiles_every_size(settings):
  measure = lambda s: {"fits": s.data.batch_size <= 4 * 11, "needs": s.data.batch_size}
  best, rows = verdict.search("update", settings, DEVICES, measure, lambda line: None)
  assert best == 11
  assert [r["images_per_device"] for r in rows] == [8, 11, 12, 14, 16] or rows[-1]["needs"] == 64


@pytest.mark.parametrize(
  ("error", "gib"),
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 22.95G of 15.75G hbm. "
      "Exceeded hbm capacity by 7.20G.",
      22.95,
    ),
    (
      "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
      "temporaries (86.21G) exceeds available HBM (15.75G).",
      86.21,
    ),
    ("RESOURCE_EXHAUSTED: no numbers", None),
  ],
)
def test_what_the_compiler_says(error, gib):
  needs = compiling.needed(error)
  assert needs == (None if gib is None else pytest.approx(gib * GIB))


def test_the_roofline():
  """Half a second of products; the rest takes less."""
  costs = {"passes": 0.5 * 197e12, "traffic": 0.25 * 819e9, "sent": 0.1 * 200e9}
  found = compiling.roofline(costs, parse("v5e-4"), images=8)
  assert found["bound"] == "products" and found["images_per_second"] == pytest.approx(16)
  assert found["seconds"] == pytest.approx({"products": 0.5, "memory": 0.25, "collectives": 0.1})
