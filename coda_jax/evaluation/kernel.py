"""Kernel distance of two sets of image features (Binkowski et al., arXiv 1801.01401).

On Inception's features it is KID, on VGG's it is VGG-KD. It has no bias, whatever the number of
images, where a Frechet distance grows as they get fewer.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from coda_jax.data import rng as rng_streams
from coda_jax.errors import UserError
from coda_jax.evaluation.rows import BLOCK, Rows


def kernel_distance(a: Rows | np.ndarray, b: Rows | np.ndarray) -> float:
  """Unbiased squared MMD with the kernel (x.y / d + 1)^3 of rows [n, d] and [m, d].

  Its expectation is 0 for two sets from one distribution, so small values may be negative. Any
  number of images, at least 2 on each side; on `lpips.pooled_features` this is VGG-KD.
  """
  n, m = len(a), len(b)
  if min(n, m) < 2:
    raise UserError(f"a kernel distance needs at least 2 images on each side, got {n} and {m}")
  return float(_within(a) + _within(b) - 2 * _kernel_sum(a, b) / (n * m))


@dataclasses.dataclass(frozen=True)
class KernelInceptionDistance:
  """KID: the mean over random subsets, and their standard deviation, with how they were drawn."""

  mean: float
  std: float
  subsets: int
  subset_size: int


def kernel_inception_distance(
  a: Rows | np.ndarray,
  b: Rows | np.ndarray,
  *,
  subsets: int = 100,
  subset_size: int = 1000,
  seed: int = 0,
) -> KernelInceptionDistance:
  """`kernel_distance` of `subsets` pairs of subsets, drawn without replacement.

  The numbers are those of the paper. Sets of fewer than `subset_size` images shorten the subsets.

  Raises:
    UserError: fewer than 2 images on a side, or features of two widths.
  """
  a, b = Rows.of(a), Rows.of(b)
  if a.width != b.width:
    raise UserError(f"features of {a.width} and {b.width} numbers cannot be compared")
  size = min(subset_size, len(a), len(b))
  distances = []
  for i in range(subsets):
    rng = rng_streams.generator(seed, rng_streams.Stream.KERNEL_SUBSET, i)
    x, y = (rows[np.sort(rng.choice(len(rows), size, replace=False))] for rows in (a, b))
    distances.append(kernel_distance(x, y))
  mean, std = float(np.mean(distances)), float(np.std(distances))
  return KernelInceptionDistance(mean, std, subsets, size)


def _within(x: Rows | np.ndarray) -> float:
  """Mean of the kernel over the pairs of two different rows."""
  n = len(x)
  own = sum(float(np.sum(_kernel(np.sum(y * y, axis=1), y.shape[1]))) for y in _blocks(x))
  return (_kernel_sum(x, x) - own) / (n * (n - 1))


def _kernel(dots: np.ndarray, width: int) -> np.ndarray:
  return (dots / width + 1) ** 3


def _kernel_sum(a: Rows | np.ndarray, b: Rows | np.ndarray) -> float:
  """Sum of the kernel over all pairs, a block of each at a time."""
  pairs = ((x, y) for x in _blocks(a) for y in _blocks(b))
  return sum(float(np.sum(_kernel(x @ y.T, x.shape[1]))) for x, y in pairs)


def _blocks(x: Rows | np.ndarray) -> Iterator[np.ndarray]:
  """Rows as float64; an array's keep their bits, which those of `Rows` have as float32."""
  if isinstance(x, Rows):
    yield from (block.astype(np.float64) for block in x.blocks())
  else:
    for i in range(0, len(x), BLOCK):
      yield x[i : i + BLOCK].astype(np.float64)
