"""Pictures of a tokenizer: labelled image grids and plots. Pixels of images are never smoothed."""

import functools
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from coda_jax.evaluation.codebook import CodebookUsage

INK, MUTED, LINE = "#1f2430", "#667085", "#e4e7ec"
COLOURS = ("#2563eb", "#d9480f", "#0f8a5f", "#9333ea", "#b7791f", "#0e7490")
_STYLE = {
  "font.family": "DejaVu Sans",
  "font.size": 9,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.edgecolor": "#98a2b3",
  "axes.labelcolor": INK,
  "axes.titlesize": 10,
  "axes.titleweight": "bold",
  "axes.titlelocation": "left",
  "axes.titlecolor": INK,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": LINE,
  "grid.linewidth": 0.7,
  "text.color": INK,
  "xtick.color": MUTED,
  "ytick.color": MUTED,
  "legend.frameon": False,
  "figure.facecolor": "white",
  "savefig.dpi": 160,
}
_CELL_MIN, _CELL_MAX, _GAP = 160, 512, 8
_PAGE = 1080  # pixels across a page of the report


def _styled(plot):
  """Draws with our style and leaves the user's matplotlib settings alone."""

  @functools.wraps(plot)
  def wrapped(*args, **kwargs):
    with matplotlib.rc_context(_STYLE):
      return plot(*args, **kwargs)

  return wrapped


@functools.cache
def _font(size: int, weight: str = "normal"):
  path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
  return ImageFont.truetype(path, size)


def thumbnail(image: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "p q 3"]:
  """As grids show it: enlarged by a whole factor, pixel by pixel, if small; reduced if large."""
  longest = max(image.shape[:2])
  if longest < _CELL_MIN:
    factor = -(-_CELL_MIN // longest)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)
  if longest > _CELL_MAX:
    height, width = (max(1, round(n * _CELL_MAX / longest)) for n in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
  return image


def _wrap(text: str, font, width: int) -> str:
  """`text` broken between words, and inside words that are too long, to fit `width` pixels."""
  lines = [""]
  for word in text.split():
    candidate = f"{lines[-1]} {word}".strip()
    if font.getlength(candidate) <= width:
      lines[-1] = candidate
      continue
    lines += [""] if lines[-1] else []
    for letter in word:
      if font.getlength(lines[-1] + letter) > width:
        lines.append("")
      lines[-1] += letter
  return "\n".join(lines)


def image_grid(
  rows: Sequence[Sequence[UInt8[np.ndarray, "_ _ 3"]]],
  columns: Sequence[str],
  captions: Sequence[Sequence[str]] | None = None,
  *,
  blocks: int = 1,
) -> Image.Image:
  """Images in rows under labelled columns; rows may be of different sizes.

  Args:
    rows: images, as many as columns in each row.
    columns: labels above.
    captions: a short text under each image.
    blocks: the rows are laid out in so many blocks side by side.
  """
  captions = captions or [[""] * len(columns)] * len(rows)
  cells = [
    [(Image.fromarray(thumbnail(image)), text) for image, text in zip(row, texts, strict=True)]
    for row, texts in zip(rows, captions, strict=True)
  ]
  height = -(-len(cells) // blocks)
  cells += [[(Image.new("RGB", (1, 1), "white"), "")] * len(columns)] * (
    height * blocks - len(rows)
  )
  cells = [[cell for row in cells[i::height] for cell in row] for i in range(height)]
  titles = [*columns] * blocks
  widths = [max(row[i][0].width for row in cells) for i in range(len(titles))]
  # Pages wider than what a reader sees are shown smaller: their text must be larger.
  zoom = max(1.0, (sum(widths) + _GAP * len(widths)) / _PAGE)
  gap, head, small = round(_GAP * zoom), _font(round(15 * zoom), "bold"), _font(round(13 * zoom))
  block_gaps = [2 * gap * (i // len(columns)) for i in range(len(titles))]
  lefts = gap + np.cumsum([0, *(w + gap for w in widths[:-1])]) + block_gaps
  measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))

  def text_height(texts, font):
    boxes = [measure.multiline_textbbox((0, 0), t, font=font, spacing=3) for t in texts if t]
    return max((box[3] for box in boxes), default=0) + (gap if boxes else 0)

  titles = [_wrap(t, head, w) for t, w in zip(titles, widths, strict=True)]
  rows_of_text = [
    [_wrap(t, small, w) for (_, t), w in zip(row, widths, strict=True)] for row in cells
  ]
  heights = [max(image.height for image, _ in row) for row in cells]
  below = [text_height(texts, small) for texts in rows_of_text]
  top = gap + text_height(titles, head)
  size = int(lefts[-1]) + widths[-1] + gap, top + sum(heights) + sum(below) + gap * len(cells)
  page = Image.new("RGB", size, "white")
  draw = ImageDraw.Draw(page)
  for left, title in zip(lefts, titles, strict=True):
    draw.multiline_text((left, gap // 2), title, INK, head, spacing=3)
  y = top
  for row, texts, row_height, extra in zip(cells, rows_of_text, heights, below, strict=True):
    for left, (image, _), text in zip(lefts, row, texts, strict=True):
      page.paste(image, (int(left), y))
      draw.multiline_text((left, y + image.height + gap // 3), text, MUTED, small, spacing=3)
    y += row_height + extra + gap
  return page


def _colour(i: int) -> str:
  return COLOURS[i % len(COLOURS)]


def _legend(figure: Figure, **kwargs):
  """One legend below the panels with every line that has a name."""
  named = {}
  for axis in figure.axes:
    named |= {t: h for h, t in zip(*axis.get_legend_handles_labels(), strict=True)}
  return figure.legend(
    named.values(), named, loc="outside lower left", ncols=max(1, len(named)), **kwargs
  )


def _panels(count: int, columns: int, width: float, height: float):
  columns = min(columns, count)
  figure = Figure(figsize=(width * columns, height * -(-count // columns)), layout="constrained")
  axes = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
  for axis in axes[count:]:
    axis.set_visible(False)
  return figure, axes[:count]


@_styled
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
  figure, axes = _panels(len(series), 3, 3.6, 2.9)
  runs = list(dict.fromkeys(run for lines in series.values() for run in lines))
  for axis, (quantity, lines) in zip(axes, series.items(), strict=True):
    for run, values in lines.items():
      x = np.arange(1, len(values) + 1)
      axis.plot(x, values, "o-", ms=3.5, color=_colour(runs.index(run)), label=run)
    if quantity in references:
      axis.axhline(references[quantity], color=MUTED, ls="--", lw=1.2, label="continuous VAE")
    axis.set(title=labels[quantity], xlabel="levels used")
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_ylim(bottom=0 if quantity != "psnr" else None)
  _legend(figure)
  return figure


def _count_bins(largest: int) -> tuple[np.ndarray, list[str]]:
  """Edges and names of the bins 0, 1, 2-3, 4-7, ... up to `largest`."""
  powers = 2 ** np.arange(int(np.log2(max(largest, 1))) + 2)
  names = [
    "0",
    *(str(a) if b == a + 1 else f"{a}–{b - 1}" for a, b in zip(powers, powers[1:], strict=False)),
  ]
  return np.concatenate([[0], powers]), names


def uniform_utilization(tokens: np.ndarray | float | int, codebook_size: int) -> np.ndarray | float:
  """Fraction of the codes that so many tokens reach if all codes are equally likely."""
  return 1 - (1 - 1 / codebook_size) ** np.asarray(tokens, np.float64)


@_styled
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
    curve.plot(x, np.where(counts, share, np.nan), color=_colour(i), lw=1.8, label=name)
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
    histogram.bar(x, found / len(usage.overall) * 100, width, color=_colour(i), label=name)
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
    levels.bar(x, usage.level_utilization * 100, width, color=_colour(i), label=name)
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
  _legend(figure)
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


@_styled
def latents_plot(
  latents: Float[np.ndarray, "n c"], quantized: Mapping[str, Float[np.ndarray, "n c"]]
) -> Figure:
  """Continuous latents and what the quantizer makes of them, in one plane (paper, Figure 3)."""
  mean, axes, _ = principal_axes(latents)
  figure, panels = _panels(1 + len(quantized), 4, 2.9, 3.0)
  flat = (latents - mean) @ axes
  for axis, (title, x) in zip(
    panels, {"continuous latents": latents, **quantized}.items(), strict=True
  ):
    points = (x - mean) @ axes
    colour = MUTED if x is latents else COLOURS[0]
    axis.scatter(*points.T, s=3, alpha=0.35, lw=0, color=colour, rasterized=True)
    _bare(axis, title)
    _frame(axis, flat)
  return figure


@_styled
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
  figure, panels = _panels(1 + len(shown), 4, 2.9, 3.0)
  sets = [("inputs of all levels", every, counts.sum(axis=0))]
  sets += [(f"level {i + 1} of {len(inputs)}", inputs[i], counts[i]) for i in shown]
  for axis, (title, x, used) in zip(panels, sets, strict=True):
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
  for handle in _legend(figure, markerscale=2.2).legend_handles:
    handle.set_alpha(1)
  return figure


@_styled
def curves_plot(
  curves: Mapping[str, Mapping[str | int, tuple[Sequence[float | int], Sequence[float | int]]]],
) -> Figure:
  """One panel per quantity over training steps: quantity -> line -> (steps, values).

  A line is a run, or the index of an entry of a vector, such as a level.
  """
  figure, axes = _panels(len(curves), 4, 2.75, 2.2)
  runs = [x for x in dict.fromkeys(x for lines in curves.values() for x in lines) if type(x) is str]
  for axis, (quantity, lines) in zip(axes, curves.items(), strict=True):
    for i, (line, (steps, values)) in enumerate(lines.items()):
      marker = "o-" if len(steps) < 30 else "-"
      if isinstance(line, int):
        style = {"color": matplotlib.colormaps["viridis"](0.9 * i / max(1, len(lines) - 1))}
      else:
        style = {"color": _colour(runs.index(line)), "label": line}
      axis.plot(steps, values, marker, ms=3, lw=1.4, **style)
    axis.set_title(quantity, fontsize=9)
    axis.tick_params(labelsize=8)
    positive = all(v > 0 for _, values in lines.values() for v in values)
    values = [v for _, vs in lines.values() for v in vs]
    if positive and max(values) > 30 * min(values):
      axis.set_yscale("log")
      axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  for axis in axes[-min(4, len(axes)) :]:
    axis.set_xlabel("step")
  _legend(figure)
  return figure


@_styled
def sweep_plot(
  steps: Sequence[int],
  seconds: Sequence[float],
  quality: Sequence[float],
  references: Mapping[str, float],
  label: str,
) -> Figure:
  """Quality of samples over seconds an image, a point for each number of steps.

  Args:
    references: quality of yardsticks, dashed lines.
    label: of the quality, where less is better.
  """
  figure = Figure(figsize=(6.4, 4.2), layout="constrained")
  axis = figure.subplots()
  axis.plot(seconds, quality, "o-", ms=5, color=_colour(0), label="samples")
  for n, x, y in zip(steps, seconds, quality, strict=True):
    axis.annotate(
      f"{n} step{'s' if n > 1 else ''}", (x, y), (6, 6), textcoords="offset points", fontsize=8
    )
  for i, (name, value) in enumerate(references.items(), 1):
    axis.axhline(value, color=_colour(i), ls="--", lw=1.2, label=name)
  axis.set(title=f"{label} against time", xlabel="seconds an image", ylabel=label, xscale="log")
  axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
  axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  axis.margins(x=0.12)
  low = min([0.0, *quality, *references.values()])
  if low >= 0:
    axis.set_ylim(bottom=0)
  figure.legend(loc="outside lower left", ncols=2)
  return figure
