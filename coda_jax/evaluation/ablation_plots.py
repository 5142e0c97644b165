"""Plots of an ablation's tables: ours above, the paper's figures below."""

import math

import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from coda_jax.config import Table
from coda_jax.evaluation.ablation_tables import (
  PAPER,
  QUANTITIES,
  Measures,
  mean_and_spread,
  values,
)
from coda_jax.evaluation.figures import INK, MUTED, colour, legend, styled


@styled
def table_plot(table: Table, measures: Measures) -> Figure:
  """A column of panels for each measure: our mean, spread and seeds; below, the paper's.

  Lines with a place on the table's axis make a curve, others a bar each. The continuous VAE is a
  dashed line.
  """
  columns = table.columns
  figure = Figure(figsize=(2.6 * len(columns), 5.1), layout="constrained")
  axes = figure.subplots(2, len(columns), squeeze=False)
  lines = [line for line in table.lines if line.row]
  references = [line for line in table.lines if not line.row]
  places = [line.x if table.axis and line.x is not None else i for i, line in enumerate(lines)]
  for (upper, lower), (ours, theirs) in zip(axes.T, columns, strict=True):
    found = [values(measures, line.row, ours) for line in lines]
    means = [mean_and_spread(x) for x in found]
    dashed = [mean_and_spread(values(measures, line.row, ours))[0] for line in references]
    _draw(upper, table, places, means, dashed, colour(0))
    for x, seeds in zip(places, found, strict=True):
      upper.plot([x] * len(seeds), list(seeds.values()), ".", color=INK, ms=4, zorder=3)
    upper.set_title(QUANTITIES[ours].label, fontsize=9)
    _label(upper, table, places, lines)
    published = [(line.paper.get(theirs, math.nan), None) for line in lines]
    if all(math.isnan(x) for x, _ in published):
      lower.set_visible(False)
      continue
    dashed = [line.paper.get(theirs, math.nan) for line in references]
    _draw(lower, table, places, published, dashed, colour(1))
    lower.set_title(f"paper: {PAPER[theirs].label}", fontsize=9)
    _label(lower, table, places, lines)
  if references:
    legend(figure)
  return figure


def _draw(axis, table: Table, x, found, references, shade: str) -> None:
  """A curve or bars of (mean, spread or None), and references as dashed lines."""
  means, spreads = [mean for mean, _ in found], [spread or 0.0 for _, spread in found]
  if table.axis:  # NaN interrupts a curve
    axis.errorbar(x, means, spreads, fmt="o-", ms=5, color=shade, capsize=3, lw=1.6)
    axis.margins(y=0.15)
  else:
    axis.bar(x, np.nan_to_num(means), 0.65, color=shade)
    there = [i for i, spread in enumerate(spreads) if spread]
    if there:
      x, y, spread = ([v[i] for i in there] for v in (x, means, spreads))
      axis.errorbar(x, y, spread, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    axis.grid(axis="x", visible=False)
  for value in references:
    if not math.isnan(value):
      axis.axhline(value, color=MUTED, ls="--", lw=1.2, label="continuous VAE")
  known = [v for v in (*means, *references) if not math.isnan(v)]
  if known and not table.axis:  # PSNR of 20 and 21 dB are two bars alike from 0
    low, high = min(known), max(known)
    margin = max(high - low, 0.02 * abs(high))
    bottom = low - 0.8 * margin if low > 0.5 * high > 0 else min(0.0, 1.2 * low)
    axis.set_ylim(bottom, high + 0.2 * margin)


def _label(axis, table: Table, places, lines) -> None:
  axis.tick_params(labelsize=8)
  space = 0.08 * (max(places) - min(places)) if table.axis else 0.6
  axis.set_xlim(min(places) - space, max(places) + space)
  if not table.axis:
    axis.set_xticks(places, [line.label for line in lines], rotation=35, ha="right")
    return
  if min(places) > 0 and max(places) >= 16 * min(places):
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(places) / 1.4, max(places) * 1.4)
  axis.set_xticks(places, [f"{x:g}" for x in places])
  axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
  axis.set_xlabel(table.axis)
