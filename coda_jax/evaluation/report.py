"""The HTML report on one or more tokenizers: one file that needs neither network nor server."""

import html
import pathlib
from collections.abc import Sequence

import tqdm

from coda_jax.evaluation import figures, html_page, latent_report, tokenizer_plots
from coda_jax.evaluation.runs import Reference, Run

_LABELS = {
  "psnr": "PSNR (dB), higher is better",
  "ssim": "SSIM, higher is better",
  "lpips": "LPIPS, lower is better",
  "error": "quantization error (% of variance)",
}


def write_report(
  path: pathlib.Path, title: str, runs: Sequence[Run], reference: Reference
) -> list[pathlib.Path]:
  """Writes the report to `path` and its pictures as PNG files beside it.

  Args:
    path: of the HTML file, in an existing folder.
    title: of the report.
    runs: the first is the one that the report is about, the others are compared with it.
    reference: images and the continuous VAE.

  Returns:
    The files written.
  """
  picture = html_page.Pictures(path)
  shown = lambda *image, text: html_page.figure(picture(*image), text)
  parts = [
    lambda: _overview(runs, reference),
    lambda: _reconstructions(runs, reference, picture),
    lambda: _levels(runs, reference, picture),
    lambda: _usage(runs, picture),
    lambda: latent_report.section(runs, shown),
    lambda: _training(runs, picture),
  ]
  bar = tqdm.tqdm(parts, desc="figures", unit="section", disable=None)
  sections = [part() for part in bar]
  measured = [
    f"Images: {html.escape(reference.data)}.",
    "Latents are the posterior's mean. PSNR and SSIM (11 × 11 Gaussian window, σ 1.5) are taken of "
    "each 8-bit image and averaged; LPIPS (VGG16, version 0.1) of float images clipped to their "
    "range.",
    "A code counts as used if at least one token chose it; perplexity is the exponential of the "
    "entropy of the codes' frequencies.",
    *map(_settings, runs),
  ]
  html_page.write(path, title, sections, measured)
  return [path, *picture.files]


def _overview(runs, reference) -> str:
  run = runs[0]
  ours, vae = run.quality.summary(), reference.quality.summary()
  gap = vae["psnr"] - ours["psnr"]
  below = f"{gap:.2f} dB below" if gap >= 0 else f"{-gap:.2f} dB above"
  lead = (
    f"{_bold(run)} turns an image of {run.config.image_size} × "
    f"{run.config.image_size} pixels into {run.tokens} tokens from a codebook of "
    f"{run.config.quantizer.codebook_size:,}. On {run.images} images it reaches "
    f"{ours['psnr']:.2f} dB PSNR, {below} the continuous VAE it was made from."
  )
  cards = [
    ("PSNR", f"{ours['psnr']:.2f} dB", f"continuous VAE {vae['psnr']:.2f} dB"),
    ("SSIM", f"{ours['ssim']:.3f}", f"continuous VAE {vae['ssim']:.3f}"),
  ]
  if "lpips" in ours:
    cards.append(("LPIPS", f"{ours['lpips']:.3f}", f"continuous VAE {vae['lpips']:.3f}"))
  cards += [
    (
      "Codes used",
      _percent(run.usage.utilization),
      f"on {_number(run.usage.tokens_per_code)} tokens per code",
    ),
    ("Tokens per image", f"{run.tokens:,}", f"{run.bits_per_pixel:.2f} bits per pixel"),
  ]
  return (
    f'<p class="lead">{lead}</p>{html_page.cards(cards)}\n'
    f"<h2>Compared</h2>{_comparison(runs, reference)}"
  )


def _comparison(runs, reference) -> str:
  has_lpips = reference.quality.lpips is not None
  head = ["", "PSNR (dB) ↑", "SSIM ↑", *(["LPIPS ↓"] if has_lpips else [])]
  head += ["Quantization error ↓", "Codes used ↑", "Codebook", "Tokens per image"]

  def row(name, quality):
    means = quality.summary()
    cells = [name, f"{means['psnr']:.2f}", f"{means['ssim']:.4f}"]
    return [*cells, f"{means['lpips']:.4f}"] if has_lpips else cells

  rows = [[*row("continuous VAE", reference.quality), "–", "–", "–", "–"]]
  for run in runs:
    rows.append(
      [
        *row(run.name, run.quality),
        _percent(run.error.relative[-1]),
        _percent(run.usage.utilization),
        f"{run.config.quantizer.codebook_size:,}",
        f"{run.tokens:,}",
      ]
    )
  notes = [
    f"Means over the same {runs[0].images} images. Quantization error: mean squared error "
    "of the latents after the last level, as a share of their variance."
  ]
  notes += [_difference(runs[0], other) for other in runs[1:]]
  if reference.lpips_note:
    notes.append(html.escape(reference.lpips_note))
  return html_page.table(head, rows) + "".join(f"<p>{n}</p>" for n in notes)


def _difference(run: Run, other: Run) -> str:
  """How far apart two runs are, image by image, with the standard error of the mean."""
  a, b = run.quality, other.quality
  gain = a.psnr - b.psnr
  word = "higher" if gain.mean() >= 0 else "lower"
  error = f" (± {gain.std(ddof=1) / len(gain) ** 0.5:.2f})" if len(gain) > 1 else ""
  text = f"Against {_bold(other)}, image by image: PSNR is {abs(gain.mean()):.2f} dB{error} {word}"
  if a.lpips is not None and b.lpips is not None:
    change = a.lpips.mean() / b.lpips.mean() - 1
    text += f", LPIPS {abs(change):.0%} {'higher' if change > 0 else 'lower'}"
  if error:
    text += "; in brackets the standard error over images"
  return text + "."


def _reconstructions(runs, reference, picture) -> str:
  count = len(reference.originals)
  columns = ["original", "continuous VAE", *(run.name for run in runs)]
  rows, captions = [], []
  for i in range(count):
    rows.append(
      [reference.originals[i], reference.continuous[i], *(run.pictures[i, -1] for run in runs)]
    )
    values = [reference.sample_quality.psnr[i], *(r.level_quality[-1].psnr[i] for r in runs)]
    captions.append(["", *(f"{v:.1f} dB" for v in values)])
  blocks = 2 if len(columns) <= 4 else 1
  grid = figures.image_grid(rows, columns, captions, blocks=blocks)
  image = picture("grid.png", grid, "originals and reconstructions")
  text = (
    f"{_some(count, runs[0].images)}. Below each reconstruction its "
    "PSNR. The continuous VAE encodes and decodes without quantization and without adapters; "
    "it is what a tokenizer made from it can hope to reach. Pixels are enlarged, not smoothed."
  )
  return f"<h2>Reconstructions</h2>{html_page.figure(image, text)}"


def _levels(runs, reference, picture) -> str:
  run = runs[0]
  shown = min(4, len(run.pictures))
  levels = len(run.level_quality)
  grid = figures.image_grid(
    [[*run.pictures[i], reference.originals[i]] for i in range(shown)],
    [*(f"{k} level{'s' if k > 1 else ''}" for k in range(1, levels + 1)), "original"],
    [[*(f"{q.psnr[i]:.1f} dB" for q in run.level_quality), ""] for i in range(shown)],
  )
  sides = ", ".join(f"{p} × {p}" for p in run.config.quantizer.patch_sizes)
  text = (
    f"The image decoded from the first 1 to {levels} levels of tokens of "
    f"{_bold(run)} (grids of {sides}), with its PSNR: coarse levels carry layout and "
    "colour, fine ones detail."
  )
  out = f"<h2>Level by level</h2>{html_page.figure(picture('levels.png', grid, 'levels'), text)}"
  series = {"error": {r.name: r.error.relative * 100 for r in runs}}
  for name in ("psnr", "lpips"):
    if getattr(run.level_quality[0], name) is not None:
      series[name] = {r.name: [q.summary()[name] for q in r.level_quality] for r in runs}
  vae = reference.sample_quality.summary()
  dashed = {k: v for k, v in vae.items() if k in series}
  plot = tokenizer_plots.levels_plot(series, dashed, _LABELS)
  few = len(run.level_quality[0].psnr)
  text = (
    "Every level quantizes what the levels before it left over: the error of "
    f"{_bold(run)} goes from {_percent(run.error.relative[0])} of the latents' "
    f"variance after one level to {_percent(run.error.relative[-1])} after all. Error on "
    f"{run.images} images, PSNR{' and LPIPS' if 'lpips' in series else ''} on {few} of them."
  )
  out += html_page.figure(picture("level_curves.png", plot, "quality by number of levels"), text)
  return out + "".join(_level_table(r, len(runs) > 1) for r in runs)


def _level_table(run: Run, named: bool) -> str:
  usage, quality = run.usage, [q.summary() for q in run.level_quality]
  has_lpips = "lpips" in quality[0]
  head = ["Level", "Tokens", "Tokens so far", "Quantization error", "Share of variance"]
  head += ["PSNR (dB)", *(["LPIPS"] if has_lpips else [])]
  head += ["Codes used", "If all equally likely", "Perplexity", "Tokens per code"]
  tokens = [p * p for p in run.config.quantizer.patch_sizes]
  rows = []
  for i, found in enumerate(quality):
    rows.append(
      [
        str(i + 1),
        f"{tokens[i]:,}",
        f"{sum(tokens[: i + 1]):,}",
        f"{run.error.levels[:, i].mean():.4f}",
        _percent(run.error.relative[i]),
        f"{found['psnr']:.2f}",
        *([f"{found['lpips']:.4f}"] if has_lpips else []),
        _percent(usage.level_utilization[i]),
        _percent(usage.uniform_level_utilization[i]),
        _number(usage.level_perplexity[i]),
        _number(usage.level_tokens_per_code[i]),
      ]
    )
  title = f"<h3>{html.escape(run.name)}</h3>" if named else ""
  return title + html_page.table(head, rows)


def _usage(runs, picture) -> str:
  plot = tokenizer_plots.usage_plot({run.name: run.usage for run in runs})
  parts = [
    f"<li>{_bold(run)}: {_percent(run.usage.utilization)} of {run.usage.codebook_size:,} "
    f"codes, perplexity {_number(run.usage.perplexity)}, measured on "
    f"{run.usage.tokens:,} tokens ({_number(run.usage.tokens_per_code)} per code) of "
    f"{html.escape(run.usage_source)}.</li>"
    for run in runs
  ]
  text = (
    "A healthy codebook has a flat curve and no codes at 0."
    f"<ul>{''.join(parts)}</ul>"
    "A level cannot use more codes than it has tokens: the black marks show how many codes it "
    "would reach by chance if all were equally likely, so a bar far below its mark is a preference "
    "for some codes, and a low mark means too few tokens to tell."
  )
  return f"<h2>Codebook</h2>{html_page.figure(picture('usage.png', plot, 'codebook usage'), text)}"


def _training(runs, picture) -> str:
  curves = figures.training_curves({run.name: run.history for run in runs})
  if not curves:
    return ""
  plot = figures.curves_plot(curves)
  first = next(r for r in runs if r.history)
  last = [f"{_bold(r)} {r.history[-1]['step']:,}" for r in runs if r.history]
  text = (
    "What training logged, over updates: “eval” on held-out images with the averaged weights, "
    f"“train” on the batches. Updates: {', '.join(last)}. Where every level has a line, colours "
    f"go from coarse (dark) to fine (light), and the lines are those of {_bold(first)}."
  )
  return (
    f"<h2>Training</h2>{html_page.figure(picture('curves.png', plot, 'training curves'), text)}"
  )


def _settings(run: Run) -> str:
  quantizer, lora = run.config.quantizer, run.config.lora
  adapters = "none"
  if lora:
    halves = " and ".join(h for h in ("encoder", "decoder") if getattr(lora, h))
    adapters = f"rank {lora.rank} on {', '.join(lora.name_parts)} of the {halves or 'neither'}"
  sizes = " ".join(map(str, quantizer.patch_sizes))
  return f"{_bold(run)}: {quantizer.lookup} look-up, levels {sizes}, LoRA: {html.escape(adapters)}."


def _bold(run: Run) -> str:
  return f"<b>{html.escape(run.name)}</b>"


def _some(count: int, total: int) -> str:
  return f"All {count} images" if count == total else f"{count} of {total} images, evenly spread"


def _percent(x: float) -> str:
  return f"{x * 100:.1f}%"


def _number(x: float) -> str:
  return f"{x:,.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"
