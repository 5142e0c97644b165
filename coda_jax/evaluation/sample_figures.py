"""Pictures of samples: a grid of classes or prompts, and a filmstrip of the steps."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import PRNGKeyArray, UInt8
from PIL import Image

from coda_jax.evaluation import figures
from coda_jax.evaluation.image_quality import to_uint8
from coda_jax.generation.generator import Generator
from coda_jax.generation.masking import masked_counts
from coda_jax.generation.sampler import SamplerSettings

_GRID_COLUMNS, _GRID_ROWS, _FILMSTRIP_ROWS, _FILMSTRIP_STEPS = 8, 12, 6, 10


def grid_indices(images: int, per_class: int) -> list[int]:
  """Indices of the samples that `sample_grid` shows: the first of the first classes."""
  columns = min(per_class, _GRID_COLUMNS)
  starts = range(0, images, per_class)[:_GRID_ROWS]
  return [start + i for start in starts for i in range(columns)]


def sample_grid(
  shown: Mapping[int, UInt8[np.ndarray, "h w 3"]], labels: Sequence[str], per_class: int
) -> Image.Image:
  """A row for each class; with one image a class, the classes stand side by side.

  Args:
    shown: samples by index, those of `grid_indices`.
    labels: the class or prompt of every sample.
    per_class: samples of each.
  """
  order = sorted(shown)
  columns = min(per_class if per_class > 1 else len(order), _GRID_COLUMNS)
  rows = [order[i : i + columns] for i in range(0, len(order), columns)]
  blank = np.full_like(shown[order[0]], 255)
  images = [[shown[i] for i in row] + [blank] * (columns - len(row)) for row in rows]
  captions = [[labels[i] for i in row] + [""] * (columns - len(row)) for row in rows]
  return figures.image_grid(images, [""] * columns, captions)


def filmstrip(
  generator: Generator,
  wanted: Sequence[int | str | None],
  labels: Sequence[str],
  settings: SamplerSettings,
  key: PRNGKeyArray,
  negative: str | None = None,
) -> Image.Image:
  """Rows of samples, columns of steps; tokens that are still masked add nothing to their level.

  Args:
    wanted, labels: class or prompt of every sample, and its name; the samples shown are spread
      over them.
    settings, key, negative: those of the samples.
  """
  apart = max(1, len(wanted) // _FILMSTRIP_ROWS)
  rows = list(range(0, len(wanted), apart))[:_FILMSTRIP_ROWS]
  n = settings.steps
  kept = sorted({round(x) for x in np.linspace(0, n - 1, min(n, _FILMSTRIP_STEPS))})
  images = []
  for row in rows:  # one at a time: their global indices are no range
    how = {"negative": negative, "first": row, "keep_steps": True}
    found = generator.sample(generator.masked(1), [wanted[row]], settings, key, **how).history
    assert found is not None, "keep_steps asks for the history"
    made = [np.asarray(generator.decode(found[k]))[0] for k in kept]
    images.append([to_uint8(x, "nearest") for x in made])
  tokens = generator.config.tokens
  left = masked_counts(settings.schedule, n, tokens)
  titles = [f"step {k + 1}: {tokens - left[k]} tokens" for k in kept]
  captions = [[labels[row]] + [""] * (len(kept) - 1) for row in rows]
  return figures.image_grid(images, titles, captions)
