"""Frechet distance of two sets of image features (Heusel et al., arXiv 1706.08500).

On Inception's features it is FID and sFID, on VGG's it is VGG-FD and never called rFID.
"""

import dataclasses
import functools

import numpy as np
from flax import struct
from jaxtyping import Float

from coda_jax.errors import UserError
from coda_jax.evaluation.rows import Rows

# Below this the 512-d covariance of VGG's features is too noisy for its distance to mean anything.
VGG_FD_IMAGES = 2000


@dataclasses.dataclass(frozen=True)
class Moments:
  """Mean [D] and covariance [D, D] of features, float64, as a file holds them."""

  mean: np.ndarray
  covariance: np.ndarray


@struct.dataclass
class FeatureStatistics:
  """Count, mean [D] and scatter [D, D] (sum of squared deviations) of features, in float64."""

  count: int | np.ndarray
  mean: np.ndarray
  scatter: np.ndarray

  @classmethod
  def of(cls, features: Float[np.ndarray, "n d"] | Rows) -> "FeatureStatistics":
    """Of an array, or of rows a block at a time."""
    if isinstance(features, Rows):
      if not len(features):
        raise UserError("there are no images to take statistics of")
      parts = (FeatureStatistics.of(block) for block in features.blocks())
      return functools.reduce(FeatureStatistics.merge, parts)
    x = features.astype(np.float64)
    mean = x.mean(axis=0)
    x -= mean
    return cls(len(x), mean, x.T @ x)

  def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
    """Statistics of both sets together (Chan et al. 1979)."""
    count = int(self.count + other.count)
    delta = other.mean - self.mean
    scatter = self.scatter + other.scatter
    scatter += np.outer(delta, delta * (self.count * other.count / count))
    return FeatureStatistics(count, self.mean + delta * (other.count / count), scatter)

  @property
  def covariance(self) -> np.ndarray:
    """[D, D], over N - 1."""
    if self.count < 2:
      raise UserError(f"a Frechet distance needs at least 2 images on each side, got {self.count}")
    return self.scatter / (self.count - 1)


def frechet_distance(a: FeatureStatistics | Moments, b: FeatureStatistics | Moments) -> float:
  """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)).

  A B and A^(1/2) B A^(1/2) have the same eigenvalues; the second is symmetric, so they come real
  and accurate without a general matrix root.

  Raises:
    UserError: the dimensions differ.
  """
  if a.mean.shape != b.mean.shape:
    raise UserError(
      f"statistics of {len(a.mean)} and of {len(b.mean)} features cannot be compared; "
      "take those of the same network and readout"
    )
  cov_a, cov_b = a.covariance, b.covariance
  values, vectors = np.linalg.eigh(cov_a)
  root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
  product = np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0, None)
  means = np.sum(np.square(a.mean - b.mean))
  return float(means + np.trace(cov_a) + np.trace(cov_b) - 2 * np.sum(np.sqrt(product)))


def check_count(name: str, features: int, *counts: int | None) -> None:
  """Raises UserError if a count is too small for covariances of so many features to have full rank.

  A count that is not known is None.
  """
  known = [n for n in counts if n is not None]
  if known and min(known) <= features:
    raise UserError(
      f"{name} needs at least {features + 1} images on each side, for its {features} features; got "
      f"{' and '.join(str(n) for n in known)}. A kernel distance takes any number"
    )


def vgg_frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
  """VGG-FD. Raises UserError below 2,000 images on either side."""
  if min(a.count, b.count) < VGG_FD_IMAGES:
    raise UserError(
      f"VGG-FD needs at least {VGG_FD_IMAGES} images on each side, got {a.count} and {b.count}; "
      "use VGG-KD for fewer"
    )
  return frechet_distance(a, b)
