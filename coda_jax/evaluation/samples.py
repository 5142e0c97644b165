"""How good samples of a generator are: the one door of evaluating them.

Features of the samples are compared with those of held-out real images, and so are yardsticks:
other real crops, those brought through the tokenizer (what its decoder leaves of a perfect
generator), tokens drawn from the real crops' marginals, one position independent of the other, and
random tokens. A measure belongs to a feature network: another network, such as FID's Inception,
is an entry in `NETWORKS` and one in `MEASURES` for each of its measures.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from coda_jax import weights
from coda_jax.arrays import jit_module
from coda_jax.data import pipeline, sources
from coda_jax.data import rng as rng_streams
from coda_jax.errors import UserError
from coda_jax.evaluation import frechet
from coda_jax.evaluation.evaluator import in_batches, outputs
from coda_jax.evaluation.image_quality import to_uint8
from coda_jax.evaluation.kernel import kernel_distance
from coda_jax.generation.generator import Generator
from coda_jax.models.lpips import LPIPS, pooled_features

Features = Mapping[str, np.ndarray]  # [N, D] by network


def _vgg(path: weights.Path | None) -> LPIPS:
  return weights.load_lpips(path) if path else weights.lpips_from_package()


_vgg_features = jit_module(lambda lpips, images: pooled_features(lpips.features(images)))

# How a network is loaded from a directory (or None), and bound as images [-1, 1] -> features.
NETWORKS: dict[str, tuple[Callable, Callable]] = {"vgg": (_vgg, _vgg_features)}


@dataclasses.dataclass(frozen=True)
class Measure:
  """A distance of two sets [N, D] of a network's features; smaller is better.

  Attributes:
    label: as people read it.
    network: key of `NETWORKS`.
    images: the least number on each side that it is reported for.
    distance: of samples and real images.
  """

  label: str
  network: str
  images: int
  distance: Callable[[np.ndarray, np.ndarray], float]


def _frechet(a: np.ndarray, b: np.ndarray) -> float:
  statistics = frechet.FeatureStatistics.of
  return frechet.vgg_frechet_distance(statistics(a), statistics(b))


MEASURES = {
  "vgg_kd": Measure("VGG-KD", "vgg", 2, kernel_distance),
  "vgg_fd": Measure("VGG-FD", "vgg", frechet.VGG_FD_IMAGES, _frechet),
}


class SampleEvaluator:
  """Measures sets of images against one set of held-out images.

  Args:
    real: the held-out images.
    networks: directories of the feature networks; what is not there comes from an installed
      package.

  Raises:
    UserError: fewer than 2 images, or a network that cannot be loaded.
  """

  def __init__(
    self,
    real: UInt8[np.ndarray, "n h w 3"],
    networks: Mapping[str, weights.Path | None] | None = None,
    batch_size: int = 16,
  ):
    if len(real) < 2:
      raise UserError(f"samples are compared with 2 real images or more, got {len(real)}")
    self._batch_size = batch_size
    self._networks = {
      name: bind(load((networks or {}).get(name))) for name, (load, bind) in NETWORKS.items()
    }
    self.real = self.features(real)

  def features(self, images: UInt8[np.ndarray, "n h w 3"]) -> Features:
    """Features of images by network."""
    out = {name: [] for name in self._networks}
    for _, features in outputs(self._of_batch, in_batches(images, self._batch_size)):
      for name, x in features.items():
        out[name].append(x)
    return {name: np.concatenate(parts) for name, parts in out.items()}

  def _of_batch(self, images: np.ndarray) -> dict[str, Any]:
    images = pipeline.normalize(images)
    return {name: network(images) for name, network in self._networks.items()}

  def measure(self, features: Features) -> dict[str, float | int]:
    """Every measure that there are enough images for, by name, and `images`, their number."""
    out: dict[str, float | int] = {"images": min(len(x) for x in features.values())}
    for name, m in MEASURES.items():
      ours, real = features[m.network], self.real[m.network]
      if min(len(ours), len(real)) >= m.images:
        out[name] = m.distance(ours, real)
    return out

  def __call__(self, images: UInt8[np.ndarray, "n h w 3"]) -> dict[str, float | int]:
    """`measure` of images."""
    return self.measure(self.features(images))


def real_crops(
  spec: str, image_size: int, count: int, seed: int = 0, resize_ratio: float = 1.125
) -> tuple[UInt8[np.ndarray, "n h w 3"], UInt8[np.ndarray, "n h w 3"]]:
  """Two sets of `count` random crops each, half of them mirrored.

  Of fewer than 2·count images the sets share images, but not crops. Raises UserError for data that
  cannot be read.
  """
  source = sources.open_source(spec)
  size = min(16, count)
  batches = pipeline.train_batches(
    source,
    image_size=image_size,
    batch_size=size,
    seed=seed,
    resize_ratio=resize_ratio,
    flip=True,
  )
  with batches:
    images = np.concatenate([next(batches)["image"] for _ in range(-(-2 * count // size))])
  return images[:count], images[count : 2 * count]


def yardsticks(
  generator: Generator, crops: UInt8[np.ndarray, "n h w 3"], seed: int = 0, batch_size: int = 16
) -> dict[str, UInt8[np.ndarray, "n h w 3"]]:
  """Sets of as many images as there are `crops`, from the best to the worst to be expected."""
  rng = rng_streams.generator(seed, rng_streams.Stream.SAMPLES)
  encoded = outputs(
    lambda x: generator.encode(pipeline.normalize(x)), in_batches(crops, batch_size)
  )
  ids = np.concatenate([ids for _, ids in encoded])
  n, tokens = ids.shape
  marginal = np.take_along_axis(ids, rng.integers(0, n, (n, tokens)), 0)
  uniform = rng.integers(0, generator.config.codebook_size, (n, tokens)).astype(ids.dtype)
  out = {"other real crops": crops}
  for name, drawn in (
    ("other real crops, reconstructed", ids),
    ("tokens from marginals", marginal),
    ("random tokens", uniform),
  ):
    parts = []
    for start in range(0, n, batch_size):
      rows = np.minimum(np.arange(start, start + min(batch_size, n)), n - 1)
      made = np.asarray(generator.decode(jnp.asarray(drawn[rows])))
      parts.append(to_uint8(made, "nearest")[: n - start])
    out[name] = np.concatenate(parts)
  return out


def table(rows: Mapping[str, Mapping[str, float | int]]) -> str:
  """Measures as text, a line for each set."""
  names = [name for name in MEASURES if any(name in row for row in rows.values())]
  width = max(map(len, rows))
  lines = [f"{'':{width}}" + "".join(f"{MEASURES[n].label:>12}" for n in names) + f"{'images':>9}"]
  for what, row in rows.items():
    cells = (f"{row[n]:.4f}" if n in row else "–" for n in names)
    lines.append(f"{what:{width}}" + "".join(f"{c:>12}" for c in cells) + f"{row['images']:>9}")
  return "\n".join(lines)


def timed_quality(
  sweep: Mapping[int, Mapping[str, float | int]], measure: str = "vgg_kd"
) -> tuple[list[int], list[float], list[float]]:
  """(steps, seconds an image, quality) of a sweep, by steps."""
  steps = sorted(sweep)
  return steps, [sweep[s]["seconds"] for s in steps], [sweep[s][measure] for s in steps]
