"""Samples of a generator, a batch at a time, and what they cost."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tqdm
from jaxtyping import Array, Float, UInt8

from coda_jax.evaluation.image_quality import to_uint8
from coda_jax.evaluation.samples import Features, SampleEvaluator
from coda_jax.generation.sampler import SamplerSettings

Classes = Sequence[int | None]
# Images, about [-1, 1], of classes, of the global index of the first, and of settings.
Make = Callable[[Classes, int, SamplerSettings], Float[Array | np.ndarray, "b h w 3"]]


def sample_batches(
  make: Make, classes: Classes, settings: SamplerSettings, batch_size: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "b h w 3"], float]]:
  """Yields (index of the first, samples, seconds of one sample) for each batch.

  Every batch is made with as many images, so that one program serves all; those that the last one
  has too many are left out.
  """
  size = min(batch_size, len(classes))
  for first in range(0, len(classes), size):
    part = list(classes[first : first + size])
    start = time.perf_counter()
    images = np.asarray(make(part + part[-1:] * (size - len(part)), first, settings))
    seconds = (time.perf_counter() - start) / size
    yield first, to_uint8(images, "nearest")[: len(part)], seconds


def joined(parts: Sequence[Features]) -> Features:
  """Features of all batches, given those of each."""
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def timed_measures(
  make: Make,
  classes: Classes,
  settings: SamplerSettings,
  batch_size: int,
  evaluator: SampleEvaluator,
) -> dict[str, float | int]:
  """Measures of samples, and `seconds`: those of one sample, compilation left out."""
  next(sample_batches(make, classes, settings, batch_size))  # compiles
  batches = tqdm.tqdm(
    sample_batches(make, classes, settings, batch_size),
    desc=f"{settings.steps} steps",
    total=-(-len(classes) // batch_size),
    unit="batch",
    disable=None,
    leave=False,
  )
  features, seconds = [], []
  for _, images, taken in batches:
    features.append(evaluator.features(images))
    seconds.append(taken)
  return {**evaluator.measure(joined(features)), "seconds": float(np.mean(seconds))}
