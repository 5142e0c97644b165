"""Distances between two sets of image features: Frechet (as in FID) and kernel (as in KID).

On VGG features they are reported as VGG-FD and VGG-KD, never as rFID.
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from coda_jax.errors import UserError

# Below this the 512-d covariance of VGG's features is too noisy for its distance to mean anything.
VGG_FD_IMAGES = 2000


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
  """Count, mean [D] and scatter [D, D] (sum of squared deviations) of features, in float64."""

  count: int
  mean: np.ndarray
  scatter: np.ndarray

  @classmethod
  def of(cls, features: Float[np.ndarray, "n d"]) -> "FeatureStatistics":
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    return cls(len(x), mean, (x - mean).T @ (x - mean))

  def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
    """Statistics of both sets together (Chan et al. 1979)."""
    count = self.count + other.count
    delta = other.mean - self.mean
    scatter = self.scatter + other.scatter
    scatter += np.outer(delta, delta) * (self.count * other.count / count)
    return FeatureStatistics(count, self.mean + delta * (other.count / count), scatter)

  @property
  def covariance(self) -> np.ndarray:
    """[D, D], over N - 1."""
    if self.count < 2:
      raise UserError(f"a Frechet distance needs at least 2 images on each side, got {self.count}")
    return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
  """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) (Heusel et al., arXiv 1706.08500).

  A B and A^(1/2) B A^(1/2) have the same eigenvalues; the second is symmetric, so they come real
  and accurate without a general matrix root.
  """
  cov_a, cov_b = a.covariance, b.covariance
  values, vectors = np.linalg.eigh(cov_a)
  root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
  product = np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)
  means = np.sum(np.square(a.mean - b.mean))
  return float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sum(np.sqrt(product)))


def vgg_frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
  """VGG-FD. Raises UserError below 2,000 images on either side."""
  if min(a.count, b.count) < VGG_FD_IMAGES:
    raise UserError(
      f"VGG-FD needs at least {VGG_FD_IMAGES} images on each side, got {a.count} and {b.count}; "
      "use VGG-KD for fewer"
    )
  return frechet_distance(a, b)


def kernel_distance(a: Float[np.ndarray, "n d"], b: Float[np.ndarray, "m d"]) -> float:
  """Unbiased squared MMD with the kernel (x.y / d + 1)^3 (Binkowski et al., arXiv 1801.01401).

  Its expectation is 0 for two sets from one distribution, so small values may be negative. Any
  number of images, at least 2 on each side; on `perceptual.pooled_features` this is VGG-KD.
  """
  n, m = len(a), len(b)
  if min(n, m) < 2:
    raise UserError(f"a kernel distance needs at least 2 images on each side, got {n} and {m}")
  a, b = a.astype(np.float64), b.astype(np.float64)
  between = _kernel_sum(a, b) / (n * m)
  return float(_within(a) + _within(b) - 2 * between)


def _within(x: np.ndarray) -> float:
  """Mean of the kernel over the pairs of two different rows."""
  n, width = x.shape
  own = np.sum(_kernel(np.sum(x * x, axis=1), width))
  return (_kernel_sum(x, x) - own) / (n * (n - 1))


def _kernel(dots: np.ndarray, width: int) -> np.ndarray:
  return (dots / width + 1) ** 3


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
  """Sum of the kernel over all pairs, 1024 rows at a time."""
  rows = range(0, len(a), 1024)
  return sum(float(np.sum(_kernel(a[i : i + 1024] @ b.T, a.shape[1]))) for i in rows)
