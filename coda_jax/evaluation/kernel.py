"""Kernel distance of two sets of image features (Binkowski et al., arXiv 1801.01401).

On Inception's features it is KID, on VGG's it is VGG-KD. It has no bias, whatever the number of
images, where a Frechet distance grows as they get fewer.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from coda_jax.data import rng as rng_streams
from coda_jax.errors import UserError
from coda_jax.evaluation.rows import BLOCK, Rows


def kernel_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
  """Unbiased squared MMD with the kernel (x.y / d + 1)^3.

  Its expectation is 0 for two sets from one distribution, so small values may be negative. Any
  number of images, at least 2 on each side; on `lpips.pooled_features` this is VGG-KD.
  """
  n, m = len(a), len(b)
  if min(n, m) < 2:
    raise UserError(f"a kernel distance needs at least 2 images on each side, got {n} and {m}")
  a, b = a.astype(np.float64), b.astype(np.float64)
  between = _kernel_sum(a, b) / (n * m)
  return float(_within(a) + _within(b) - 2 * between)


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


def _within(x: np.ndarray) -> float:
  """Mean of the kernel over the pairs of two different rows."""
  n, width = x.shape
  own = np.sum(_kernel(np.sum(x * x, axis=1), width))
  return (_kernel_sum(x, x) - own) / (n * (n - 1))


def _kernel(dots: np.ndarray, width: int) -> np.ndarray:
  return (dots / width + 1) ** 3


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
  """Sum of the kernel over all pairs, `BLOCK` rows at a time."""
  rows = range(0, len(a), BLOCK)
  return sum(float(np.sum(_kernel(a[i : i + BLOCK] @ b.T, a.shape[1]))) for i in rows)
