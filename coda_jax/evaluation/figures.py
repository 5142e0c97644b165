"""Labelled image grids and plots of runs. Pixels of images are never smoothed."""

import functools
import math
import re
from collections.abc import Mapping, Sequence

import matplotlib
import matplotlib.ticker
import numpy as np
from jaxtyping import UInt8
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

INK, MUTED, LINE = "#1f2430", "#667085", "#e4e7ec"
COLOURS = ("#2563eb", "#d9480f", "#0f8a5f", "#9333ea", "#b7791f", "#0e7490")
_CELL_MIN, _CELL_MAX, _GAP = 160, 512, 8
_PAGE = 1080  # pixels across a page of the report
_VECTOR_ENTRY = re.compile(r"(.+)/(?:level_)?(\d+)")
_NOT_CURVES = ("kind", "step", "steps_per_second", "images_per_second", "tokens_per_code")
_FIRST_CURVES = ("psnr", "ssim", "lpips", "loss", "nll", "l1", "mse")


# Decorator: the function draws with our style and leaves the user's matplotlib settings alone.
styled = matplotlib.rc_context(
  {
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
)


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
    return math.ceil(max((box[3] for box in boxes), default=0)) + (gap if boxes else 0)

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


def colour(i: int) -> str:
  return COLOURS[i % len(COLOURS)]


def legend(figure: Figure, **kwargs):
  """One legend below the panels with every line that has a name."""
  named = {}
  for axis in figure.axes:
    named |= {t: h for h, t in zip(*axis.get_legend_handles_labels(), strict=True)}
  return figure.legend(
    named.values(), named, loc="outside lower left", ncols=max(1, len(named)), **kwargs
  )


def panels(count: int, columns: int, width: float, height: float):
  columns = min(columns, count)
  figure = Figure(figsize=(width * columns, height * -(-count // columns)), layout="constrained")
  axes = figure.subplots(-(-count // columns), columns, squeeze=False).ravel()
  for axis in axes[count:]:
    axis.set_visible(False)
  return figure, axes[:count]


def training_curves(
  histories: Mapping[str, Sequence[Mapping]],
) -> dict[str, dict[str | int, tuple[list, list]]]:
  """Quantity -> line -> (steps, values) of runs' histories, by name, evaluations first.

  A line is a run, or, for quantities that are vectors (`name/0`, `name/level_1`, ...), an index;
  of those the first run with a history is taken.
  """
  found: dict[tuple[str, str, bool], dict] = {}
  vectors_of = next((name for name, history in histories.items() if history), None)
  for run, history in histories.items():
    for record in history:
      kind = record.get("kind", "")
      for key, value in record.items():
        vector = _VECTOR_ENTRY.fullmatch(key)
        if key in _NOT_CURVES or not isinstance(value, int | float):
          continue
        if vector and run != vectors_of:
          continue
        name, line = (vector[1], int(vector[2])) if vector else (key, run)
        lines = found.setdefault((kind, name, bool(vector)), {})
        steps, values = lines.setdefault(line, ([], []))
        steps.append(record["step"])
        values.append(value)

  def order(curve):
    kind, name, vector = curve
    rank = _FIRST_CURVES.index(name) if name in _FIRST_CURVES else len(_FIRST_CURVES)
    return kind != "eval", vector, rank, name

  titles = {
    curve: f"{curve[0]}: {curve[1].replace('_', ' ')}{' by level' if curve[2] else ''}"
    for curve in sorted(found, key=order)
  }
  return {
    title: found[curve]
    for curve, title in titles.items()
    if max(len(steps) for steps, _ in found[curve].values()) > 1
  }


@styled
def curves_plot(
  curves: Mapping[str, Mapping[str | int, tuple[Sequence[float | int], Sequence[float | int]]]],
) -> Figure:
  """One panel per quantity over training steps: quantity -> line -> (steps, values).

  A line is a run, or the index of an entry of a vector, such as a level.
  """
  figure, axes = panels(len(curves), 4, 2.75, 2.2)
  runs = [x for x in dict.fromkeys(x for lines in curves.values() for x in lines) if type(x) is str]
  for axis, (quantity, lines) in zip(axes, curves.items(), strict=True):
    for i, (line, (steps, values)) in enumerate(lines.items()):
      marker = "o-" if len(steps) < 30 else "-"
      if isinstance(line, int):
        style = {"color": matplotlib.colormaps["viridis"](0.9 * i / max(1, len(lines) - 1))}
      else:
        style = {"color": colour(runs.index(line)), "label": line}
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
  legend(figure)
  return figure


@styled
def sweep_plot(
  curves: Mapping[str, Sequence[tuple[int, float, float]]],
  references: Mapping[str, float],
  label: str,
) -> Figure:
  """Quality of samples over seconds an image: (steps, seconds, quality) of a line's points.

  Args:
    references: quality of yardsticks, dashed lines.
    label: of the quality, where less is better.
  """
  figure = Figure(figsize=(6.4, 4.2), layout="constrained")
  axis = figure.subplots()
  for i, (name, points) in enumerate(curves.items()):
    steps, seconds, quality = zip(*points, strict=True)
    axis.plot(seconds, quality, "o-", ms=5, color=colour(i), label=name)
    for n, x, y in zip(steps, seconds, quality, strict=True):
      text = f"{n} step{'s' if n > 1 else ''}"
      axis.annotate(text, (x, y), (6, 6), textcoords="offset points", fontsize=8)
  for i, (name, value) in enumerate(references.items(), len(curves)):
    axis.axhline(value, color=colour(i), ls="--", lw=1.2, label=name)
  axis.set(title=f"{label} against time", xlabel="seconds an image", ylabel=label, xscale="log")
  axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
  axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
  axis.margins(x=0.12)
  values = [y for points in curves.values() for *_, y in points]
  if min([0.0, *values, *references.values()]) >= 0:
    axis.set_ylim(bottom=0)
  figure.legend(loc="outside lower left", ncols=2)
  return figure
