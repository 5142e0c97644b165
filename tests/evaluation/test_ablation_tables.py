"""Means, spreads and orders of an ablation's tables."""

import json
import math

import numpy as np
import pytest

from coda_jax import config as c
from coda_jax.evaluation import ablation_tables
from coda_jax.evaluation.ablation_plots import table_plot

TABLE = c.Table(
  "Sizes",
  (("psnr", "psnr"), ("lpips", "")),
  (
    c.Line("VAE", paper={"psnr": 30.0}),
    c.Line("small", "small", {"psnr": 20.0}, 4.0),
    c.Line("middle", "middle", {"psnr": 21.0}, 16.0),
    c.Line("large", "large", {"psnr": 22.0}, 64.0),
    c.Line("huge", "huge", {"psnr": 23.0}, 256.0),
  ),
  axis="codes",
)
ROWS = {name: {"tokenizer__lora": None} for name in ("small", "middle", "large", "huge")}
ABLATION = c.AblationConfig({"steps": 3}, ROWS, {"sizes": TABLE})
# Seed by seed the middle gains 1 on the small one; the large one 0.5 ± 1.5 on the middle.
MEASURES = {
  "": {0: {"psnr": 29.0}},
  "small": {0: {"psnr": 18.0}, 1: {"psnr": 20.0}},
  "middle": {0: {"psnr": 19.0}, 1: {"psnr": 21.1}},
  "large": {0: {"psnr": 21.0}, 1: {"psnr": 20.1}},
  "huge": {},
}


def test_spread_is_the_standard_deviation_over_seeds():
  assert ablation_tables.mean_and_spread({0: 18.0, 1: 20.0}) == (19.0, pytest.approx(2**0.5))
  assert ablation_tables.mean_and_spread({3: 18.0}) == (18.0, None)
  mean, spread = ablation_tables.mean_and_spread({})
  assert math.isnan(mean) and spread is None


def test_rows_are_compared_seed_by_seed():
  mean, error = ablation_tables.compare({0: 1.0, 1: 5.0, 2: 9.0}, {1: 4.0, 0: 0.5}) or (0, 0)
  assert (mean, error) == (0.75, 0.25)
  assert ablation_tables.compare({0: 1.0}, {1: 1.0}) is None


def test_orders():
  assert ablation_tables.orders(TABLE, MEASURES) == {
    "psnr ~ psnr": {
      "same": ["small < middle"],
      "reversed": [],
      "unclear": ["small < large", "middle < large"],
      "missing": ["small < huge", "middle < huge", "large < huge"],
    }
  }


@pytest.mark.parametrize(("theirs", "kind"), [((1.0, 2.0), "reversed"), ((2.0, 1.0), "same")])
def test_less_is_better_of_errors(theirs, kind):
  lines = tuple(c.Line(x, x, {"rfid": y}) for x, y in zip("ab", theirs, strict=True))
  table = c.Table("", (("lpips", "rfid"),), lines)
  measures = {"a": {0: {"lpips": 0.4}}, "b": {0: {"lpips": 0.3}}}
  (found,) = ablation_tables.orders(table, measures).values()
  assert len(found[kind]) == 1


def test_markdown_and_json():
  missing = {"huge": [0, 1]}
  lines = ablation_tables.as_markdown(ABLATION, MEASURES, missing).splitlines()
  assert "Not there yet: huge (seed 0, 1)." in lines
  assert "| small | 19.00 ± 1.41 | – | 2 | 20.00 |" in lines
  assert "| VAE | 29.00 | – |  | 30.00 |" in lines
  assert "| huge | – | – | 0 | 23.00 |" in lines
  (order,) = (x for x in lines if x.startswith("- PSNR"))
  assert "1 of 3 pairs in the paper's order; unclear: small < large, middle < large." in order
  many = {f"row{i}": [0, 1] for i in range(20)}
  first = ablation_tables.as_markdown(ABLATION, MEASURES, many).splitlines()[0]
  assert first == "Not there yet: 40 runs of 20 rows (all in tables.json)."
  found = json.loads(json.dumps(ablation_tables.as_json(ABLATION, MEASURES, missing)))
  assert found["rows"]["small"]["changes"] == {"tokenizer.lora": None}
  assert found["rows"]["small"]["runs"]["1"] == {"psnr": 20.0}
  assert found["tables"]["sizes"]["lines"][1]["mean"] == {"psnr": 19.0}
  assert found["missing"] == missing and found["base"] == {"steps": 3}


def test_plot_shows_means_seeds_and_the_papers_figures():
  figure = table_plot(TABLE, MEASURES)
  ours, _, theirs, hidden = figure.axes
  means, *seeds = ours.lines[0], *(x for x in ours.lines if x.get_marker() == ".")
  expected = [[4, 19], [16, 20.05], [64, 20.55], [256, np.nan]]
  np.testing.assert_allclose(means.get_xydata(), expected)
  assert [np.size(x.get_ydata()) for x in seeds] == [2, 2, 2, 0]
  np.testing.assert_allclose(theirs.lines[0].get_xydata()[:, 1], [20, 21, 22, 23])
  assert theirs.get_title("left") == "paper: PSNR (dB)" and not hidden.get_visible()
