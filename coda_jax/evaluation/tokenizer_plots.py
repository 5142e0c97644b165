"""Plots of a tokenizer: its levels, the use of its codes, and its latents."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.figures import COLOURS, INK, LINE, MUTED, colour, legend, panels, styled


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


def uniform_utilization(tokens: np.ndarray, codebook_size: int) -> np.ndarray:
  """Fraction of the codes that so many tokens reach if all codes are equally likely."""
  return 1 - (1 - 1 / codebook_size) ** np.asarray(tokens, np.float64)


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
    reach = uniform_utilization(usage.counts.sum(axis=1), usage.counts.shape[1])
    levels.scatter(
      x,
      reach * 100,
      marker="_",
      s=1600 * width / deepest**0.5,
      color=INK,
      lw=1.6,
      zorder=3,
      label="if all codes were equally likely" if i == len(usages) - 1 else None,
    )
  longest = max(usages.values(), key=lambda u: len(u.counts))
  ticks = [f"level {i + 1}\n{_short(t)}" for i, t in enumerate(longest.level_tokens_per_code)]
  levels.set(
    title="Codes used at each level (below: tokens per code that this was measured on)",
    ylabel="% of the codes",
    ylim=(0, 104),
    xticks=range(deepest),
    xticklabels=ticks,
  )
  levels.grid(axis="x", visible=False)
  legend(figure)
  return figure


def _short(x: float) -> str:
  return f"{x:.2g}" if x < 10 else f"{x:,.0f}"


def principal_axes(
  x: Float[np.ndarray, "n c"],
) -> tuple[Float[np.ndarray, "c"], Float[np.ndarray, "c 2"], float]:
  """Mean, two principal axes and the fraction of the variance in their plane."""
  mean = x.mean(axis=0, dtype=np.float64)
  values, vectors = np.linalg.eigh(np.cov(x.astype(np.float64) - mean, rowvar=False))
  axes = vectors[:, ::-1][:, :2]
  axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1]])  # one sign on every machine
  return mean.astype(np.float32), axes.astype(np.float32), float(values[-2:].sum() / values.sum())


def _frame(axis, *points: np.ndarray) -> None:
  """Limits that leave out the farthest 1% of the points."""
  low, high = np.percentile(np.concatenate(points), [0.5, 99.5], axis=0)
  margin = 0.12 * np.maximum(high - low, 1e-6)
  axis.set_xlim(low[0] - margin[0], high[0] + margin[0])
  axis.set_ylim(low[1] - margin[1], high[1] + margin[1])


def _bare(axis, title: str) -> None:
  axis.set(title=title, xticks=[], yticks=[])
  axis.grid(False)
  for side in axis.spines.values():
    side.set(visible=True, color=LINE)


@styled
def latents_plot(
  latents: Float[np.ndarray, "n c"], quantized: Mapping[str, Float[np.ndarray, "n c"]]
) -> Figure:
  """Continuous latents and what the quantizer makes of them, in one plane (paper, Figure 3)."""
  mean, axes, _ = principal_axes(latents)
  figure, cells = panels(1 + len(quantized), 4, 2.9, 3.0)
  flat = (latents - mean) @ axes
  for axis, (title, x) in zip(
    cells, {"continuous latents": latents, **quantized}.items(), strict=True
  ):
    points = (x - mean) @ axes
    colour = MUTED if x is latents else COLOURS[0]
    axis.scatter(*points.T, s=3, alpha=0.35, lw=0, color=colour, rasterized=True)
    _bare(axis, title)
    _frame(axis, flat)
  return figure


@styled
def codes_plot(
  inputs: Sequence[Float[np.ndarray, "_ c"]],
  values: Float[np.ndarray, "v c"],
  counts: Int[np.ndarray, "levels v"],
  shown: Sequence[int],
) -> Figure:
  """Codes over what they are looked up for: all levels together, then some (paper, Figure 6).

  Args:
    inputs: latents at the input of each level.
    values: what each code stands for.
    counts: how often each level used it.
    shown: levels with a panel of their own, from 0.
  """
  least = min(len(x) for x in inputs)
  per_level = max(least, 2000 // len(inputs))  # coarse levels have few inputs: let them be seen
  every = np.concatenate([x[:: max(1, len(x) // per_level)][:per_level] for x in inputs])
  mean, axes, _ = principal_axes(every)
  codes = (values - mean) @ axes
  figure, cells = panels(1 + len(shown), 4, 2.9, 3.0)
  sets = [("inputs of all levels", every, counts.sum(axis=0))]
  sets += [(f"level {i + 1} of {len(inputs)}", inputs[i], counts[i]) for i in shown]
  for axis, (title, x, used) in zip(cells, sets, strict=True):
    x = x[:: max(1, len(x) // 4000)]
    unused = used == 0
    axis.scatter(
      *((x - mean) @ axes).T, s=4, alpha=0.3, lw=0, color=MUTED, rasterized=True, label="latents"
    )
    axis.scatter(
      *codes[unused].T,
      s=9,
      lw=0.6,
      marker="x",
      color="#f0a48a",
      rasterized=True,
      label="unused codes",
    )
    axis.scatter(
      *codes[~unused].T, s=9, alpha=0.8, lw=0, color=COLOURS[0], rasterized=True, label="used codes"
    )
    _bare(axis, title)
    _frame(axis, (every - mean) @ axes, codes)
  for handle in filter(None, legend(figure, markerscale=2.2).legend_handles):
    handle.set_alpha(1)
  return figure
