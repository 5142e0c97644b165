"""LPIPS (Zhang et al., arXiv 1801.03924) with VGG16 and the learned heads, version 0.1."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from coda_jax.errors import UserError
from coda_jax.models.vgg import STAGES, VGG16

# (x - shift) / scale takes images in [-1, 1] to ImageNet's normalisation.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)

Maps = tuple[Float[Array, "b _ _ _"], ...]


class LPIPS(nnx.Module):
  """Perceptual distance. Frozen: take no gradient for its parameters.

  Attributes: `vgg` and `heads`, five non-negative vectors [C]. `dtype` is VGG's compute type;
  norms, differences and means are float32 always. A training step calls `features` once for the
  real images and once for the reconstructions, and `distance` on the two.
  """

  def __init__(self, *, dtype=jnp.float32):
    self.vgg = VGG16(dtype=dtype)
    self.heads = nnx.List([nnx.Param(jnp.zeros((widths[-1],))) for widths in STAGES])

  def features(self, images: Float[Array, "b h w 3"]) -> Maps:
    """VGG's five maps, not yet normalised, of images in [-1, 1] with sides of at least 16."""
    if min(images.shape[1:3]) < 16:
      raise UserError(f"LPIPS needs images of at least 16x16, got {images.shape[1:3]}")
    images = images.astype(jnp.float32)
    return self.vgg((images - jnp.array(SHIFT)) / jnp.array(SCALE))

  def distance(self, a: Maps, b: Maps) -> Float[Array, "b"]:
    """Distance of each image of `a` from the one of `b`, given their `features`."""
    total = jnp.zeros(len(a[0]))
    for head, x, y in zip(self.heads, a, b, strict=True):
      difference = jnp.square(_unit(x) - _unit(y))
      total += jnp.mean(jnp.sum(difference * head[...], axis=-1), axis=(1, 2))
    return total

  def __call__(self, a: Float[Array, "b h w 3"], b: Float[Array, "b h w 3"]) -> Float[Array, "b"]:
    """Distance of each image of `a` from the one of `b`; both in [-1, 1]."""
    return self.distance(self.features(a), self.features(b))


def _unit(x):
  """x / (|x| + 1e-10) along channels. A zero vector stays zero and gets no gradient.

  Without the guard the root's derivative there is infinite, and the product with 2x = 0 is NaN.
  """
  x = x.astype(jnp.float32)
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  there = square > 0
  root = jnp.sqrt(jnp.where(there, square, 1.0))
  return jnp.where(there, x / (root + 1e-10), 0.0)


def pooled_features(maps: Maps) -> Float[Array, "b 512"]:
  """relu5_3 averaged over positions, float32: what VGG-FD and VGG-KD compare."""
  return jnp.mean(maps[-1].astype(jnp.float32), axis=(1, 2))
