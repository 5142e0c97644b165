"""The table of docs/scaling.md."""

import pytest

from benchmarks import scaling
from coda_jax import cli
from coda_jax.planning.chips import GIB
from coda_jax.training import registry


@pytest.mark.parametrize("row", scaling.ROWS)
def test_the_command_of_a_row(row):
  for remat in (False, True):
    config, *rest = scaling.words(row, remat)
    overrides = [w for w in rest if w.startswith("--config.")]
    settings = registry.resolve(cli.load_config(config.removeprefix("--config="), overrides))
    assert settings.remat in ({"blocks", True} if remat else {"none", False})
    assert settings.data.accumulation == 1


def test_rows():
  result = {
    "images_per_chip": 8.0,
    "remat": False,
    "fits": True,
    "needs": 8 * GIB,
    "limit": 15.75 * GIB,
    "costs": {"passes": 41e12, "traffic": 60e9, "sent": 0.1e9},
    "seconds": {"products": 0.2, "memory": 0.1, "collectives": 0.001},
    "bound": "products",
    "images_per_second": 2560.0,
    "steps": 25_020,
    "xla": {"flops": 7e12},
  }
  assert scaling.line("MAR v5e-64", result) == (
    "| MAR | v5e-64 | 8 | no | 8.0 / 15.75 | 41.0 | 60 | 0.10 | 200 / 100 / 1 | 2,560 | 1.39 | "
    "products |"
  )
  assert "| 8.0 + code / 15.75 |" in scaling.line("MAR v5e-64", result | {"xla": None})
  large = result | {"fits": False, "needs": None, "remat": True}
  assert scaling.line("MAR v5e-64", large).endswith("| does not fit |")
  cells = {scaling.line("MAR v5e-64", r).count("|") for r in (None, large, result)}
  assert cells == {13}


def test_the_document_has_the_results():
  assert scaling.table(scaling.read()) in scaling.DOCUMENT.read_text()
