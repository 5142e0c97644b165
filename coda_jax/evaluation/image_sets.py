"""The sets of an evaluation: real images, reconstructions, samples of files and of generators."""

import abc
import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from coda_jax.data.pipeline import normalize
from coda_jax.evaluation.conventions import Convention
from coda_jax.evaluation.entries import Entry, flat_ids
from coda_jax.evaluation.evaluator import outputs
from coda_jax.evaluation.features import Networks
from coda_jax.evaluation.image_quality import Quality
from coda_jax.evaluation.readers import Reader, batches
from coda_jax.evaluation.reconstruction import Batch, lpips_from
from coda_jax.generation.sampler import SamplerSettings

Make = Callable[[Sequence[int], SamplerSettings], Any]  # numbers of images -> floats
_OF_CODES = ("level_errors", "latent_mean", "latent_power")


class MeasuredSet(abc.ABC):
  """What all sets share; `measure` is that of `parts.ImageSet`."""

  def __init__(
    self,
    name: str,
    count: int,
    networks: Networks,
    convention: Convention,
    batch_size: int,
    identity: Mapping[str, Any],
  ):
    self.name, self.count, self._networks = name, count, networks
    self._features, self._batch_size = networks.features(convention), batch_size
    self.identity: dict[str, Any] = {
      **identity,
      "networks": dict(networks.fingerprints),
      "convention": convention.describe(),
    }

  @abc.abstractmethod
  def measure(self, indices: range) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """See `parts.ImageSet`."""


class RealImages(MeasuredSet):
  """Features of images as a reader gives them."""

  def __init__(
    self,
    name: str,
    reader: Reader,
    networks: Networks,
    convention: Convention,
    batch_size: int,
  ):
    super().__init__(name, reader.count, networks, convention, batch_size, reader.identity)
    self._reader = reader

  def measure(self, indices: range) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    failed: list[str] = []
    read = batches(self._reader, indices, self._batch_size, failed)
    rows = ({"index": b["index"], **found} for b, found in outputs(self._features, read))
    return _joined(rows), {"failed": failed}

  def images(self, count: int) -> list[np.ndarray]:
    """The first images, uint8."""
    return list(self._reader.load(range(count))[0])


class Reconstructions(MeasuredSet):
  """An entry's reconstructions of images: likeness, tokens and features of each."""

  def __init__(
    self,
    entry: Entry,
    reader: Reader,
    networks: Networks,
    convention: Convention,
    batch_size: int,
  ):
    identity = {**reader.identity, **entry.identity}
    if entry.posterior == "sample":
      identity["batch_size"] = batch_size  # which decides the random numbers
    super().__init__(entry.name, reader.count, networks, convention, batch_size, identity)
    self.entry, self._reader = entry, reader

  def measure(self, indices: range) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    failed: list[str] = []
    rows = (self._rows(batch, result) for batch, result in self._results(indices, failed))
    return _joined(rows), {"failed": failed}

  def results(self, indices: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(original uint8, reconstruction about [-1, 1]) of single images, as they were measured.

    A sample of the posterior is drawn anew.
    """
    out = []
    for i in indices:
      images, _, _ = self._reader.load([i])
      x = normalize(np.repeat(images, self._batch_size, 0))  # the shape that is compiled
      made = np.asarray(self.entry.reconstruct(x, i).images)[0]
      out.append((images[0], made))
    return out

  def image_name(self, index: int) -> str:
    """What a person calls an image."""
    return self._reader.name(index)

  def _results(self, indices: range, failed: list[str]):
    starts = iter(range(indices.start, indices.stop, self._batch_size))

    def function(images: np.ndarray):
      x = normalize(images)
      result = self.entry.reconstruct(x, next(starts))
      distance = lpips_from(self._networks.lpips, x)
      return dataclasses.replace(result, lpips=distance(jnp.asarray(result.images)))

    yield from outputs(function, batches(self._reader, indices, self._batch_size, failed))

  def _rows(self, batch: Mapping[str, np.ndarray], result) -> dict[str, np.ndarray]:
    quality = Quality.of(Batch(batch["image"], result))
    rows = {"index": batch["index"], "psnr": quality.psnr, "ssim": quality.ssim}
    found = {"lpips": quality.lpips, "ids": flat_ids(result)}
    found |= {name: getattr(result, name) for name in _OF_CODES}
    rows |= {name: np.asarray(x) for name, x in found.items() if x is not None}
    return rows | self._padded_features(result.images)

  def _padded_features(self, images: np.ndarray) -> dict[str, np.ndarray]:
    """Of a batch without the rows that are not valid, by the shape that is compiled."""
    n = len(images)
    padded = images[np.minimum(np.arange(self._batch_size), max(n - 1, 0))] if n else images
    if not n:
      padded = np.zeros((self._batch_size, *images.shape[1:]), np.float32)
    return {name: np.asarray(x)[:n] for name, x in self._features(padded).items()}


class Samples(MeasuredSet):
  """What a generator makes of numbers of images; `seconds` of a batch's image are kept.

  Args:
    make: numbers of images and settings to floats [b, h, w, 3], about [-1, 1]. Numbers that are
      repeated at the end fill the batch.
    settings: of the sampler.
    identity: of the generator, classes and seed.
  """

  def __init__(
    self,
    name: str,
    count: int,
    make: Make,
    settings: SamplerSettings,
    networks: Networks,
    convention: Convention,
    batch_size: int,
    identity: Mapping[str, Any],
  ):
    super().__init__(name, count, networks, convention, batch_size, identity)
    self._make, self.settings, self._warm = make, settings, False

  def measure(self, indices: range) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    seconds, out, size = [], [], self._batch_size
    for first in range(indices.start, indices.stop, size):
      part = np.minimum(np.arange(first, first + size), indices.stop - 1).tolist()
      if not self._warm:
        self._make(part, self.settings)
        self._warm = True
      start = time.perf_counter()
      images = np.asarray(self._make(part, self.settings))
      seconds.append((time.perf_counter() - start) / size)
      n = min(size, indices.stop - first)
      found = {name: np.asarray(x)[:n] for name, x in self._features(images).items()}
      out.append({"index": np.asarray(part[:n]), **found})
    return _joined(out), {"failed": [], "seconds": seconds}

  def images(self, count: int) -> np.ndarray:
    """The first samples, floats, about [-1, 1]."""
    parts = []
    for first in range(0, count, self._batch_size):
      made = self._make(list(range(first, first + self._batch_size)), self.settings)
      parts.append(np.asarray(made)[: count - first])
    return np.concatenate(parts)


def _joined(rows: Iterable[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Arrays of all batches, given those of each."""
  parts = list(rows)
  return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
