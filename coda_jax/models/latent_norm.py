"""Normalisation of latents by statistics of their patches, as FLUX.2 has it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

EPS = 1e-4  # `bn_eps` of FLUX.2's autoencoder


class LatentNorm(nnx.Module):
  """(z − mean) / sqrt(var + 1e-4), with a mean and variance for each entry of a p x p patch.

  FLUX.2 moves 2 x 2 latents into 128 channels and normalises each of these (batch norm without
  weights, in evaluation). Here the latents stay where they are. Statistics: [p, p, C].
  """

  def __init__(self, patch: int, channels: int):
    self.mean = nnx.BatchStat(jnp.zeros((patch, patch, channels)))
    self.var = nnx.BatchStat(jnp.ones((patch, patch, channels)))

  def normalize(self, z: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    return self._by_patch(lambda x, mean, std: (x - mean) / std, z)

  def denormalize(self, x: Float[Array, "*b h w c"]) -> Float[Array, "*b h w c"]:
    """Inverse of `normalize`."""
    return self._by_patch(lambda x, mean, std: x * std + mean, x)

  def _by_patch(self, f, x: jax.Array) -> jax.Array:
    *b, h, w, c = x.shape
    patch = self.mean.shape[0]
    mean, std = self.mean[...], jnp.sqrt(self.var[...] + EPS)
    patches = x.reshape(*b, h // patch, patch, w // patch, patch, c)
    return f(patches, mean[:, None], std[:, None]).reshape(x.shape)
