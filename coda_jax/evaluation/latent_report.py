"""The report's section on latent space."""

import html
from collections.abc import Callable, Sequence

import numpy as np

from coda_jax.evaluation import latent_plots
from coda_jax.evaluation.runs import Run

_MOMENTS = 3  # of the codes' movement, besides the paths: a row of panels


def section(runs: Sequence[Run], figure: Callable[..., str]) -> str:
  """HTML of coverage, confidence and movement of the codes.

  Args:
    figure: of a file's name, a picture and its alternative text, and `text`, its caption.
  """
  parts = ["<h2>Latent space</h2>"]
  for i, run in enumerate(runs):
    suffix = "" if i == 0 else f"_{i + 1}"
    if len(runs) > 1:
      parts.append(f"<h3>{html.escape(run.name)}</h3>")
    parts += [_coverage(run, suffix, figure), _codes(run, suffix, figure)]
    if run.movement:
      parts.append(_movement(run, suffix, figure))
  return "".join([*parts, _confidence(runs, figure)])


def _coverage(run: Run, suffix: str, figure: Callable[..., str]) -> str:
  x = run.latents
  keep = slice(None, None, max(1, len(x.continuous) // 4000))
  quantized = {
    f"after {k + 1} level{'s' if k else ''}": x.quantized[k][keep] for k in _stops(len(x.quantized))
  }
  inside = latent_plots.principal_axes(x.continuous)[2]
  plot = latent_plots.latents_plot(x.continuous[keep], quantized)
  text = (
    f"{len(x.continuous[keep]):,} latents of {run.config.vae.z_channels} channels in the plane "
    f"of their two largest principal components ({inside:.0%} of their variance), and what the "
    f"first levels make of them. The closer the clouds, the less is lost."
  )
  return figure(f"pca{suffix}.png", plot, "latents and their quantization", text=text)


def _codes(run: Run, suffix: str, figure: Callable[..., str]) -> str:
  x = run.latents
  stops = _stops(len(x.quantized))
  plot = latent_plots.codes_plot(x.level_inputs, x.codes, x.values, x.usage, stops)
  text = (
    "The codes (what each adds to the latents) over the vectors they are looked up for, in one "
    "plane for all panels: first the inputs of all levels, then of single ones. Codes should "
    "cover the cloud. Used and unused refer to the tokens of the same images."
  )
  if len(x.codes) < x.usage.codebook_size:
    text += f" {len(x.codes):,} of {x.usage.codebook_size:,} codes are drawn."
  return figure(f"pca_codes{suffix}.png", plot, "codes over latents", text=text)


def _movement(run: Run, suffix: str, figure: Callable[..., str]) -> str:
  """How the codes moved, from the first checkpoint that is there to the last."""
  every = sorted(run.movement)
  chosen = np.linspace(0, len(every) - 1, min(_MOMENTS, len(every))).round().astype(int)
  x = run.latents.level_inputs[-1]
  plot = latent_plots.movement_plot(x, {every[i]: run.movement[every[i]] for i in chosen})
  text = (
    "The codes in training, from the run's checkpoints, over what the last level of the trained "
    "tokenizer looks up. Codes that cover the cloud can all be used."
  )
  return figure(f"movement{suffix}.png", plot, "movement of the codes in training", text=text)


def _confidence(runs: Sequence[Run], figure: Callable[..., str]) -> str:
  found = {run.name: (run.latents.confidence_label, run.latents.confidence) for run in runs}
  plot = latent_plots.confidence_plot(found)
  n, k = runs[0].latents.confidence.shape
  text = (
    f"The {k} likeliest codes of {n} vectors that the last level looks up; bright is likely. A row "
    "that fades at once is a sure choice; a row of one shade is an ambiguous one, in which many "
    "codes would do as well or as badly."
  )
  return figure("confidence.png", plot, "confidence over the likeliest codes", text=text)


def _stops(levels: int) -> list[int]:
  """The first level, the middle one and the last."""
  return sorted({0, levels // 2 - 1, levels - 1} - {-1})
