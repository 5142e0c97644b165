"""Samples of a generator, a batch at a time, and what they cost."""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from jaxtyping import Array, Float, UInt8

from coda_jax.evaluation.image_quality import to_uint8
from coda_jax.generation.conditions import Wanted
from coda_jax.generation.sampler import SamplerSettings

# Images, about [-1, 1], of classes or prompts, of the global index of the first, and of settings.
Make = Callable[[Wanted, int, SamplerSettings], Float[Array | np.ndarray, "b h w 3"]]


def sample_batches(
  make: Make, wanted: Sequence[int | str | None], settings: SamplerSettings, batch_size: int
) -> Iterator[tuple[int, UInt8[np.ndarray, "b h w 3"], float]]:
  """Yields (index of the first, samples, seconds of one sample) for each batch.

  Every batch is made with as many images, so that one program serves all; those that the last one
  has too many are left out.
  """
  size = min(batch_size, len(wanted))
  for first in range(0, len(wanted), size):
    part = list(wanted[first : first + size])
    start = time.perf_counter()
    images = np.asarray(make(part + part[-1:] * (size - len(part)), first, settings))
    seconds = (time.perf_counter() - start) / size
    yield first, to_uint8(images, "nearest")[: len(part)], seconds
