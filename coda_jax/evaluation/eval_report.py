"""The pages of an evaluation: Markdown, and HTML with pictures of what was measured."""

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coda_jax import outputs, storage
from coda_jax.evaluation import figures, html_page, record, results
from coda_jax.evaluation.comparison import Evaluation
from coda_jax.evaluation.image_quality import psnr, to_uint8
from coda_jax.evaluation.image_sets import RealImages, Samples
from coda_jax.evaluation.parts import Measured
from coda_jax.training.logging import read_metrics

_SHOWN, _GRID, _COLUMNS = 4, 24, 8  # reconstructions of a kind; samples


def write(
  output: pathlib.Path,
  title: str,
  found: Mapping[str, Any],
  evaluation: Evaluation,
  parts: Mapping[str, Measured],
  generator: storage.Path | None,
) -> None:
  """Writes `report.html`, its pictures and `results.md` into `output`.

  Args:
    found: the results.
    parts: of every set, by its name.
    generator: the curves of the training around it are shown.
  """
  picture = html_page.Pictures(output / "report.html")
  sections = [
    _overview(found),
    _reconstructions(evaluation, parts, picture),
    _codebooks(found),
    _samples(evaluation, picture),
    _sweep(found, picture),
    _curves(generator, picture),
  ]
  measured = [
    f"<b>{html.escape(name)}</b>: " + "; ".join(map(html.escape, record.lines(entry["record"])))
    for name, entry in found["entries"].items()
  ]
  measured += [html.escape(line) for line in results.notes(found)]
  html_page.write(picture.page, title, sections, measured)
  outputs.write_text(output / "results.md", results.markdown(found, title))


def _overview(found: Mapping[str, Any]) -> str:
  name, row = next(iter(results.all_rows(found).items()))
  head, lines = results.table({name: row})
  shown = list(zip(head[1:], lines[0][1:], strict=True))
  cards = [(html.escape(label), value, "") for label, value in shown]
  text = html_page.table(*results.table(results.all_rows(found)))
  said = "".join(f"<li>{html.escape(line)}</li>" for line in results.differences(found))
  compared = f"<p>Image by image:</p><ul>{said}</ul>" if said else ""
  lead = (
    f'<p class="lead">{found["entries"][name]["images"]:,} images of <b>{html.escape(name)}</b>, '
    f"by the convention of {found['entries'][name]['record']['convention']}.</p>"
  )
  return f"{lead}{html_page.cards(cards)}<h2>All figures</h2>{text}{compared}"


def _reconstructions(evaluation: Evaluation, parts: Mapping[str, Measured], picture) -> str:
  """The best, median and worst images of the first entry, and what the others make of them."""
  if not evaluation.entries:
    return ""
  first, *_ = evaluation.entries
  quality = results.quality_of(parts[first.name])
  by_lpips = quality.lpips is not None
  score = -quality.lpips if quality.lpips is not None else quality.psnr
  order = np.argsort(-score, kind="stable")  # the best first
  n, shown = len(order), min(_SHOWN, len(order))
  middle = max(0, n // 2 - shown // 2)
  kinds = {"best": order[:shown], "median": order[middle : middle + shown], "worst": order[-shown:]}
  index = parts[first.name].values("index")
  measure = "LPIPS" if by_lpips else "PSNR"
  out = "<h2>Reconstructions</h2>"
  for kind, rows in kinds.items():
    numbers = [int(index[r]) for r in rows]
    made = {e.name: e.results(numbers) for e in evaluation.entries}
    grid, captions = [], []
    for i, number in enumerate(numbers):
      original = made[first.name][i][0]
      images = [original]
      texts = [evaluation.entries[0].image_name(number)]
      for found in made.values():
        image = found[i][1]
        images.append(to_uint8(image, "nearest"))
        texts.append(f"{psnr(original, to_uint8(image)):.1f} dB")
      grid.append(images)
      captions.append(texts)
    columns = ["original", *made]
    blocks = 2 if len(columns) <= 4 else 1
    page = figures.image_grid(grid, columns, captions, blocks=blocks)
    text = (
      f"The {kind} of {n} images by {measure} of <b>{html.escape(first.name)}</b>, with the PSNR "
      "of each reconstruction. Pixels are enlarged, not smoothed."
    )
    out += html_page.figure(picture(f"{kind}.png", page, f"{kind} reconstructions"), text)
  return out


def _codebooks(found: Mapping[str, Any]) -> str:
  out = ""
  for name, entry in found["entries"].items():
    if codes := entry.get("codebook"):
      known = codes["utilization"] is not None
      head = ["Level", "Tokens", *(["Codes used"] if known else []), "Perplexity"]
      head += ["Entropy (bits a token)", "Tokens per code"]
      lines = []
      for i, level in enumerate(codes["levels"], 1):
        used = [f"{100 * level['utilization']:.1f}%"] if known else []
        cells = [f"{level[k]:,.2f}" for k in ("perplexity", "entropy_bits", "tokens_per_code")]
        lines.append([str(i), f"{level['tokens']:,}", *used, *cells])
      total = [f"{100 * codes['utilization']:.1f}%"] if known else []
      cells = [f"{codes[k]:,.2f}" for k in ("perplexity", "entropy_bits")]
      each = codes["tokens_per_code"]
      cells.append(f"{each:,.2f}" if each is not None else "–")
      lines.append(["all", f"{codes['tokens_per_image']:,}", *total, *cells])
      out += f"<h3>{html.escape(name)}</h3>{html_page.table(head, lines)}"
  return f"<h2>Codebook</h2>{out}" if out else ""


def _samples(evaluation: Evaluation, picture) -> str:
  if not evaluation.samples:
    return ""
  first = evaluation.samples[0]
  count = min(_GRID, first.count)
  if isinstance(first, Samples):
    images: Sequence[np.ndarray] = list(to_uint8(first.images(count), "nearest"))
  else:
    assert isinstance(first, RealImages)
    images = first.images(count)
  grid = [images[i : i + _COLUMNS] for i in range(0, count, _COLUMNS)]
  blank = np.full_like(images[0], 255)
  grid = [[*row, *[blank] * (min(_COLUMNS, count) - len(row))] for row in grid]
  page = figures.image_grid(grid, [""] * len(grid[0]))
  text = f"The first {count} of {first.count:,} samples."
  shown = html_page.figure(picture("samples.png", page, "samples"), text)
  return f"<h2>Samples</h2>{shown}"


def _sweep(found: Mapping[str, Any], picture) -> str:
  if not found.get("sweep"):
    return ""
  sweep = found["sweep"]
  names = [n for n in ("fid", "kid", "vgg_kd") if all(n in x["values"] for x in sweep)]
  named = {f"{x['steps']} steps, guidance {x['guidance']:g}": x["values"] for x in sweep}
  head, lines = results.table(named)
  lines = [[*line, f"{x['seconds']:.3g}"] for line, x in zip(lines, sweep, strict=True)]
  out = html_page.table([*head, "Seconds an image"], lines)
  if names:
    label = results.LABELS[names[0]].removesuffix(" ↓")
    curves: dict[str, list[tuple[int, float, float]]] = {}
    for x in sorted(sweep, key=lambda x: (x["guidance"], x["steps"])):
      point = x["steps"], x["seconds"], x["values"][names[0]]
      curves.setdefault(f"guidance {x['guidance']:g}", []).append(point)
    known = {k: v["values"].get(names[0]) for k, v in found.get("yardsticks", {}).items()}
    dashed = {k: v for k, v in known.items() if v is not None and k != "random tokens"}
    plot = figures.sweep_plot(curves, dashed, label)
    text = "Quality over time: a point for each number of steps, a line for each guidance."
    out += html_page.figure(picture("sweep.png", plot, "quality against time"), text)
  return f"<h2>Steps and guidance</h2>{out}"


def _curves(generator: storage.Path | None, picture) -> str:
  """The curves of the training that a generator lies in, unless it was moved."""
  if generator is None:
    return ""
  curves = figures.training_curves({"generator": read_metrics(storage.resolved(generator).parent)})
  if not curves:
    return ""
  plot = figures.curves_plot(curves)
  text = "What training logged, over updates; lines of levels go from coarse (dark) to fine."
  shown = html_page.figure(picture("curves.png", plot, "training curves"), text)
  return f"<h2>Training</h2>{shown}"
