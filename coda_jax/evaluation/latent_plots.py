"""Plots of latent space: its coverage, how sure look-ups are, and how codes move in training."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.figures import COLOURS, LINE, MUTED, legend, panels, styled


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
  codes: Int[np.ndarray, "v"],
  values: Float[np.ndarray, "v c"],
  usage: CodebookUsage,
  shown: Sequence[int],
) -> Figure:
  """Codes over what they are looked up for: all levels together, then some (paper, Figure 6).

  Args:
    inputs: latents at the input of each level.
    codes: ids of those that are drawn; values: what each stands for.
    usage: how often each level used them.
    shown: levels with a panel of their own, from 0.
  """
  least = min(len(x) for x in inputs)
  per_level = max(least, 2000 // len(inputs))  # coarse levels have few inputs: let them be seen
  every = np.concatenate([x[:: max(1, len(x) // per_level)][:per_level] for x in inputs])
  mean, axes, _ = principal_axes(every)
  points = (values - mean) @ axes
  figure, cells = panels(1 + len(shown), 4, 2.9, 3.0)
  sets = [("inputs of all levels", every, usage.overall)]
  sets += [(f"level {i + 1} of {len(inputs)}", inputs[i], usage.at_level(i)) for i in shown]
  for axis, (title, x, used) in zip(cells, sets, strict=True):
    x = x[:: max(1, len(x) // 4000)]
    unused = used[codes] == 0
    axis.scatter(
      *((x - mean) @ axes).T, s=4, alpha=0.3, lw=0, color=MUTED, rasterized=True, label="latents"
    )
    axis.scatter(
      *points[unused].T,
      s=9,
      lw=0.6,
      marker="x",
      color="#f0a48a",
      rasterized=True,
      label="unused codes",
    )
    axis.scatter(
      *points[~unused].T,
      s=9,
      alpha=0.8,
      lw=0,
      color=COLOURS[0],
      rasterized=True,
      label="used codes",
    )
    _bare(axis, title)
    _frame(axis, (every - mean) @ axes, points)
  for handle in filter(None, legend(figure, markerscale=2.2).legend_handles):
    handle.set_alpha(1)
  return figure


@styled
def confidence_plot(found: Mapping[str, tuple[str, Float[np.ndarray, "n k"]]]) -> Figure:
  """The likeliest codes of some vectors, a panel for each run (paper, Figure 5).

  Args:
    found: run -> (what is shown, its values for the k likeliest codes of each vector, likeliest
      first). Distances, which grow, are shown with colours reversed: bright is likely.
  """
  figure, axes = panels(len(found), 2, 4.6, 2.9)
  for axis, (name, (label, values)) in zip(axes, found.items(), strict=True):
    grows = values[:, -1].sum() > values[:, 0].sum()
    image = axis.imshow(values, aspect="auto", cmap="magma_r" if grows else "magma", vmin=0)
    axis.set(title=name, xlabel="codes, likeliest first", ylabel="vector", yticks=[])
    axis.set_xticks([0, values.shape[1] - 1], ["1", str(values.shape[1])])
    axis.grid(False)
    figure.colorbar(image, ax=axis, label=label)
  return figure


@styled
def movement_plot(
  inputs: Float[np.ndarray, "n c"], codes: Mapping[int, Float[np.ndarray, "v c"]]
) -> Figure:
  """Codes at some steps of training over latents, then the paths of some (paper, Figure 6).

  Args:
    inputs: latents as the trained tokenizer has them, in gray.
    codes: the vector of each code by step, ascending.
  """
  points = inputs[:: max(1, len(inputs) // 4000)]
  mean, axes, _ = principal_axes(points)
  steps, moving = list(codes), np.stack([(x - mean) @ axes for x in codes.values()])
  figure, cells = panels(1 + len(steps), 4, 2.9, 3.0)
  cloud = (points - mean) @ axes
  few = moving[:, :: max(1, moving.shape[1] // 150)]
  for axis in cells:
    axis.scatter(*cloud.T, s=4, alpha=0.3, lw=0, color=MUTED, rasterized=True, label="latents")
    _frame(axis, cloud, moving.reshape(-1, 2))
  for axis, step, x in zip(cells, steps, moving, strict=False):
    axis.scatter(*x.T, s=7, alpha=0.7, lw=0, color=COLOURS[0], rasterized=True, label="codes")
    _bare(axis, f"{step:,} update{'s' if step != 1 else ''}")
  paths = LineCollection(list(few.swapaxes(0, 1)), colors=COLOURS[0], lw=0.7, alpha=0.6)
  cells[-1].add_collection(paths)
  cells[-1].scatter(*few[-1].T, s=9, lw=0, color=COLOURS[1], label="where they end")
  _bare(cells[-1], f"paths of {few.shape[1]} codes")
  for handle in filter(None, legend(figure, markerscale=2.2).legend_handles):
    handle.set_alpha(1)
  return figure
