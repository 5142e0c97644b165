"""Coordinates of blocks of latents in which the error counts as it does in the decoded image.

Within b x b latents of C channels, D numbers, a small error e of one block costs e M eᵀ in the
image. M = E[g gᵀ] over blocks and images, where g is the part of Jᵀ r in a block, J the decoder's
Jacobian and r white noise: one vector-Jacobian product an image. With the blocks' covariance S and
M = L Lᵀ the coordinates are (x − mean) L U, U the eigenvectors of Lᵀ S L: uncorrelated, and their
squared error is that of the image (Gersho and Gray, "Vector quantization and signal compression",
section 8.6, for the weighted error; the Karhunen-Loève transform of L ᵀx).
"""

import dataclasses

import numpy as np
from jaxtyping import Float

from coda_jax.models.transform_quantizer import to_blocks

_RIDGE = 1e-3  # of the mean eigenvalue: M is estimated, and its inverse must not be extreme


@dataclasses.dataclass(frozen=True)
class Transform:
  """An affine map of blocks to coordinates and back.

  Attributes:
    block: side of a block.
    mean: [D] of blocks.
    analysis: [D, D] and synthesis: [D, D], its inverse.
    variances: [D] of the coordinates, largest first.
  """

  block: int
  mean: np.ndarray
  analysis: np.ndarray
  synthesis: np.ndarray
  variances: np.ndarray

  def coordinates(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "m d"]:
    """Coordinates of all blocks of latents."""
    return (self._rows(latents) - self.mean) @ self.analysis

  def differences(self, error: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "m d"]:
    """What an error of latents is in coordinates."""
    return self._rows(error) @ self.analysis

  def _rows(self, latents: Float[np.ndarray, "n h w c"]) -> Float[np.ndarray, "m d"]:
    blocks = np.asarray(to_blocks(latents, self.block))
    return blocks.reshape(-1, blocks.shape[-1])


def moments(
  latents: Float[np.ndarray, "n h w c"], block: int
) -> tuple[Float[np.ndarray, "d"], Float[np.ndarray, "d d"]]:
  """Mean and second moments about 0 of blocks, summed in float64 image by image."""
  d = block * block * latents.shape[-1]
  total, squares, count = np.zeros(d), np.zeros((d, d)), 0
  for x in latents:
    rows = to_blocks(x, block).reshape(-1, d).astype(np.float64)
    total, squares, count = total + rows.sum(0), squares + rows.T @ rows, count + len(rows)
  return total / count, squares / count


def fit_transform(
  latents: Float[np.ndarray, "n h w c"], gradients: Float[np.ndarray, "m h w c"], block: int
) -> Transform:
  """The transform of a block size, by latents and by vector-Jacobian products (see the module)."""
  mean, second = moments(latents, block)
  covariance = second - np.outer(mean, mean)
  _, metric = moments(gradients, block)
  values, vectors = np.linalg.eigh(metric)
  roots = np.sqrt(np.maximum(values, 0) + _RIDGE * max(values.mean(), 1e-30))
  root, inverse = (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T
  variances, axes = np.linalg.eigh(root @ covariance @ root)
  axes = axes[:, ::-1]
  return Transform(block, mean, root @ axes, axes.T @ inverse, np.maximum(variances[::-1], 0))


def plain_transform(latents: Float[np.ndarray, "n h w c"]) -> Transform:
  """Every channel for itself, brought to a variance of 1."""
  mean, second = moments(latents, 1)
  std = np.sqrt(np.maximum(np.diag(second) - mean**2, 1e-12))
  return Transform(1, mean, np.diag(1 / std), np.diag(std), np.ones(len(std)))
