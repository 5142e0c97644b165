"""Plots of a tokenizer: its levels and the use of its codes."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.figures import INK, MUTED, colour, legend, panels, styled

_MOST_TICKS = 12  # levels that have room for their names


@styled
def levels_plot(
  series: Mapping[str, Mapping[str, Sequence[float | int] | np.ndarray]],
  references: Mapping[str, float],
  labels: Mapping[str, str],
) -> Figure:
  """One panel per quantity over the number of levels, one line per run (paper, Figure 4).

  Args:
    series: quantity -> run -> value after 1 to L levels.
    references: quantity -> value of the continuous VAE, a dashed line.
    labels: quantity -> title.
  """
  figure, axes = panels(len(series), 3, 3.6, 2.9)
  runs = list(dict.fromkeys(run for lines in series.values() for run in lines))
  for axis, (quantity, lines) in zip(axes, series.items(), strict=True):
    for run, values in lines.items():
      x = np.arange(1, len(values) + 1)
      axis.plot(x, values, "o-", ms=3.5, color=colour(runs.index(run)), label=run)
    if quantity in references:
      axis.axhline(references[quantity], color=MUTED, ls="--", lw=1.2, label="continuous VAE")
    axis.set(title=labels[quantity], xlabel="levels used")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0 if quantity != "psnr" else None)
  legend(figure)
  return figure


def _count_bins(largest: int) -> tuple[np.ndarray, list[str]]:
  """Edges and names of the bins 0, 1, 2-3, 4-7, ... up to `largest`."""
  powers = 2 ** np.arange(int(np.log2(max(largest, 1))) + 2)
  names = [
    "0",
    *(str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in zip(powers, powers[1:], strict=False)),
  ]
  return np.concatenate([[0], powers]), names


@styled
def usage_plot(usages: Mapping[str, CodebookUsage]) -> Figure:
  """How each run uses its codes: sorted curve, histogram, utilization of every level."""
  figure = Figure(figsize=(10.8, 6.2), layout="constrained")
  (curve, histogram), (levels, _) = grid = figure.subplots(2, 2)
  spec = levels.get_gridspec()
  for axis in grid[1]:
    axis.remove()
  levels = figure.add_subplot(spec[1, :])
  for i, (name, usage) in enumerate(usages.items()):
    counts = np.sort(usage.overall)[::-1]
    x = np.arange(1, len(counts) + 1) / len(counts) * 100
    share = counts / max(counts.mean(), 1e-12)
    curve.plot(x, np.where(counts, share, np.nan), color=colour(i), lw=1.8, label=name)
  curve.axhline(1, color=MUTED, ls="--", lw=1)
  curve.text(100, 1.06, "all codes alike", color=MUTED, ha="right", va="bottom", fontsize=8)
  curve.set(
    title="Codes sorted by use",
    xlabel="codes, most used first (% of the codebook)",
    ylabel="use / mean use",
    yscale="log",
    xlim=(0, 100),
  )
  edges, names = _count_bins(int(max(u.overall.max() for u in usages.values())))
  width = 0.8 / len(usages)
  for i, (name, usage) in enumerate(usages.items()):
    found = np.histogram(usage.overall, [*edges, np.inf])[0][: len(names)]
    x = np.arange(len(names)) + (i - (len(usages) - 1) / 2) * width
    histogram.bar(x, found / len(usage.overall) * 100, width, color=colour(i), label=name)
  histogram.set(
    title="How often a code was used",
    xlabel="times used",
    ylabel="% of the codes",
    xticks=range(len(names)),
  )
  histogram.set_xticklabels(names, fontsize=8, rotation=45 if len(names) > 9 else 0)
  histogram.grid(axis="x", visible=False)
  deepest = max(len(u.counts) for u in usages.values())
  for i, (name, usage) in enumerate(usages.items()):
    x = np.arange(len(usage.counts)) + (i - (len(usages) - 1) / 2) * width
    levels.bar(x, usage.level_utilization * 100, width, color=colour(i), label=name)
    levels.scatter(
      x,
      usage.uniform_level_utilization * 100,
      marker="_",
      s=1600 * width / deepest**0.5,
      color=INK,
      lw=1.6,
      zorder=3,
      label="if all codes were equally likely" if i == len(usages) - 1 else None,
    )
  longest = max(usages.values(), key=lambda u: len(u.counts))
  shown = range(0, deepest, -(-deepest // _MOST_TICKS))
  ticks = [f"level {i + 1}\n{_short(longest.level_tokens_per_code[i])}" for i in shown]
  levels.set(
    title="Codes used at each level (below: tokens per code that this was measured on)",
    ylabel="% of the codes",
    ylim=(0, 104),
    xticks=shown,
    xticklabels=ticks,
  )
  levels.grid(axis="x", visible=False)
  legend(figure)
  return figure


def _short(x: float) -> str:
  return f"{x:.2g}" if x < 10 else f"{x:,.0f}"
