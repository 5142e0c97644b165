"""Multi-scale residual quantizer (paper, section 4).

At each level the residual is area-pooled to p x p, every vector is looked up in one shared
codebook, and the values, bicubically upsampled, are added to the reconstruction and taken from
the residual. Nothing is detached along the chain.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from coda_jax.models.inputs import check_latents
from coda_jax.models.lookup_base import Found, Lookup, QuantizerConfig
from coda_jax.models.lookups import LOOKUPS
from coda_jax.ops.codebook_lookup import code_values
from coda_jax.ops.resize import area_resize, bicubic_resize

# Sides of the token grids that the paper takes for images of 256 pixels: 680 and 2240 tokens.
MAR_PATCH_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
FLUX_PATCH_SIZES = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
# By the latents' side. These are VAR's (arXiv 2404.02905) for 256, 512 and 1024 pixels at 16x; the
# last have 9451 tokens.
PATCH_SIZES = {
  16: MAR_PATCH_SIZES,
  32: FLUX_PATCH_SIZES,
  64: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}


@struct.dataclass
class QuantizerOutput:
  """What the quantizer makes of latents [B, h, w, C].

  Attributes:
    ids: one int32 [B, ph, pw] per level, coarse to fine.
    latents: [B, h, w, C] quantized, with straight-through gradients.
    vq_loss: L_q averaged over levels (paper, Eq. 10 and 11).
    entropy_loss: L_e averaged over levels; 0 for Euclidean look-up and FSQ.
    level_mse: [levels] mean squared error of the latents after each level.
  """

  ids: list[jax.Array]
  latents: jax.Array
  vq_loss: jax.Array
  entropy_loss: jax.Array
  level_mse: jax.Array


class ResidualQuantizer(Lookup):
  """Quantizes latents into token grids, coarse to fine; one codebook serves all levels.

  The quantizer has the parameters and methods of the config's look-up: its class derives from that
  of the look-up too.
  """

  def __new__(cls, config: QuantizerConfig, *, rngs: nnx.Rngs) -> "ResidualQuantizer":
    return object.__new__(_with_lookup(config.lookup))

  def _levels(
    self, latents: Float[Array, "b h w c"], look_up: Callable[[Array, Any], Found]
  ) -> Iterator[tuple[Found, Array, Array]]:
    """Yields what `look_up` found, the quantized latents and the residual of each level."""
    b, h, w, c = latents.shape
    residual, total, codes = latents, jnp.zeros_like(latents), self.codes()
    for size in self.config.level_sizes(h, w):
      found = look_up(area_resize(residual, size).reshape(-1, c), codes)
      values = bicubic_resize(found.values.reshape(b, *size, c), (h, w))
      total, residual, codes = total + values, residual - values, found.codes
      yield found._replace(ids=found.ids.reshape(b, *size)), total, residual

  def __call__(self, latents: Float[Array, "b h w c"]) -> QuantizerOutput:
    """Quantizes scaled latents and gives the losses; for training."""
    check_latents(latents, self.config.code_dim)
    levels = self._levels(latents.astype(jnp.float32), self.look_up)
    found, totals, residuals = zip(*levels, strict=True)
    return QuantizerOutput(
      ids=[f.ids for f in found],
      latents=totals[-1],
      vq_loss=jnp.mean(jnp.array([f.vq_loss for f in found])),
      entropy_loss=jnp.mean(jnp.array([f.entropy_loss for f in found])),
      level_mse=jax.lax.stop_gradient(jnp.array([jnp.square(r).mean() for r in residuals])),
    )

  def encode(self, latents: Float[Array, "b h w c"]) -> list[Int[Array, "b p q"]]:
    """Ids of scaled latents, one array per level, coarse to fine."""
    check_latents(latents, self.config.code_dim)
    values = self.values()

    def look_up(x, codes):
      ids = self.ids(x, codes)
      return Found(ids, code_values(values, ids), codes)

    return [found.ids for found, *_ in self._levels(latents.astype(jnp.float32), look_up)]

  def decode(
    self, ids: list[Int[Array, "b _ _"]], size: tuple[int, int] | None = None
  ) -> Float[Array, "b h w c"]:
    """Scaled latents of the given levels, which may be the first few only.

    Args:
      ids: int32 [B, ph, pw] per level, coarse to fine.
      size: latent height and width; the training size unless given or, with all levels, seen.

    Raises:
      UserError: no levels, too many, ids that are no codes, or grids that do not belong to `size`.
    """
    size = self.config.check(ids, size)
    return functools.reduce(jnp.add, self.level_latents(ids, size))

  def level_latents(
    self, ids: list[Int[Array, "b _ _"]], size: tuple[int, int]
  ) -> list[Float[Array, "b h w c"]]:
    """What each of the first levels adds to latents of `size`; id V, that of a mask, adds 0."""
    values = jnp.pad(self.values(), ((0, 1), (0, 0)))
    return [bicubic_resize(code_values(values, i), size) for i in ids]

  def vectors(
    self, latents: Float[Array | np.ndarray, "*b h w c"]
  ) -> Float[Array | np.ndarray, "*b h w c"]:
    """Latents as the vectors that the codes are for: as they are."""
    return latents

  def values_of(self, ids: Int[Array | np.ndarray, "n"]) -> Float[Array, "n c"]:
    """`values` of some codes."""
    return code_values(self.values(), jnp.asarray(ids))

  def embedding_values(self) -> Float[Array, "v c"]:
    """The code values as a generator embeds them."""
    return self.values()


@functools.cache
def _with_lookup(name: str) -> type[ResidualQuantizer]:
  """The class of the residual quantizer with this look-up."""

  class Quantizer(ResidualQuantizer, LOOKUPS[name]):
    """Its methods of levels and the look-up's parameters and methods."""

  return Quantizer
