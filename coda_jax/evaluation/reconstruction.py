"""Images through a tokenizer and back, level by level, and through its continuous VAE.

The functions are pure, of a module and arrays, for use under `jax.jit`; `arrays.jit_module`
compiles them. `evaluation.evaluator` runs them over batches.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Float, UInt8

from coda_jax import arrays, weights
from coda_jax.arrays import jit_module
from coda_jax.models.lpips import LPIPS
from coda_jax.models.tokenizer import Tokenizer
from coda_jax.models.vae import AutoencoderKL
from coda_jax.ops.resize import area_resize


@struct.dataclass
class Encoded:
  """A batch of images in latent space.

  Attributes:
    ids: int32 [B, ph, pw] per level, coarse to fine.
    latents: [B, h, w, C] continuous, scaled.
    quantized: [B, L, h, w, C] the latents quantized by the first 1 to L levels.
    codebook_size: V; ids are below it.
    level_codes: how many of them each level chooses from.
  """

  ids: Sequence[jax.Array | np.ndarray]
  latents: jax.Array | np.ndarray
  quantized: jax.Array | np.ndarray
  codebook_size: int = struct.field(pytree_node=False)
  level_codes: tuple[int, ...] = struct.field(pytree_node=False, default=())

  @property
  def level_errors(self) -> Float[Array, "b levels"]:
    """Mean squared error of each image's latents after each level: the quantization error."""
    return jnp.square(self.latents[:, None] - self.quantized).mean((2, 3, 4))

  def level_inputs(self) -> list[Float[Array, "n c"]]:
    """The vectors that each level looks up: the pooled residual of the levels before it."""
    latents = jnp.asarray(self.latents)
    left = [latents, *(latents - self.quantized[:, i] for i in range(len(self.ids) - 1))]
    sizes = [(p, q) for _, p, q in (ids.shape for ids in self.ids)]
    pooled = map(area_resize, left, sizes)
    return [x.reshape(-1, x.shape[-1]) for x in pooled]


def encode_levels(
  tokenizer: Tokenizer, images: Float[Array, "b h w 3"], key: jax.Array | None = None
) -> Encoded:
  """Ids of images in [-1, 1] and the latents after every level.

  Takes the posterior's mean, or a sample if `key` is given.
  """
  latents = tokenizer.latents(images, key)
  ids = tokenizer.quantizer.encode(latents)
  _, h, w, _ = latents.shape
  steps = jnp.stack(tokenizer.quantizer.level_latents(ids, (h, w)), axis=1)
  config = tokenizer.config.quantizer
  quantized = jnp.cumsum(steps, axis=1)
  return Encoded(ids, latents, quantized, config.codebook_size, config.codes_by_level)


def decode_latents(
  tokenizer: Tokenizer, latents: Float[Array, "b p q c"]
) -> Float[Array, "b h w 3"]:
  """Images in about [-1, 1] of scaled latents."""
  return tokenizer.vae.decode(tokenizer.vae.unscale_latents(latents))


def continuous_reconstruction(
  vae: AutoencoderKL, images: Float[Array, "b h w 3"]
) -> Float[Array, "b h w 3"]:
  """Images through a continuous VAE and back, by the posterior's mean."""
  return vae.decode(vae.encode(images).mean)


through_vae = jit_module(continuous_reconstruction)


@struct.dataclass
class BatchResult:
  """Reconstructions of a batch and the values that metrics need; a VAE without tokens has no ids.

  Attributes:
    images: [B, H, W, 3] reconstructions, not clipped.
    lpips: [B] distance of each from its original, or None without the network.
    ids: int32 [B, ph, pw] per level.
    level_errors: [B, L] quantization error after each level.
    latent_mean: [B, C], latent_power: [B], mean and mean square of the continuous latents.
    codebook_size: V; ids are below it.
    level_codes: how many of them each level chooses from.
  """

  images: jax.Array | np.ndarray
  lpips: jax.Array | np.ndarray | None = None
  ids: Sequence[jax.Array | np.ndarray] = ()
  level_errors: jax.Array | np.ndarray | None = None
  latent_mean: jax.Array | np.ndarray | None = None
  latent_power: jax.Array | np.ndarray | None = None
  codebook_size: int = struct.field(pytree_node=False, default=0)
  level_codes: tuple[int, ...] = struct.field(pytree_node=False, default=())

  @classmethod
  def of(
    cls, encoded: Encoded, images: Float[Array, "b h w 3"], lpips: Float[Array, "b"] | None
  ) -> "BatchResult":
    """Of a batch encoded, decoded from all levels, and compared."""
    return cls(
      images=images,
      lpips=lpips,
      ids=encoded.ids,
      level_errors=encoded.level_errors,
      latent_mean=encoded.latents.mean((1, 2)),
      latent_power=jnp.square(encoded.latents).mean((1, 2, 3)),
      codebook_size=encoded.codebook_size,
      level_codes=encoded.level_codes,
    )


@struct.dataclass
class Batch:
  """Originals uint8 [N, H, W, 3] and their `BatchResult` in host memory, the input of a metric."""

  images: UInt8[np.ndarray, "n h w 3"]
  result: BatchResult


def reconstruct_batch(
  tokenizer: Tokenizer,
  images: Float[Array, "b h w 3"],
  lpips: LPIPS | None = None,
  key: jax.Array | None = None,
) -> BatchResult:
  """All that metrics need of a batch of images in [-1, 1]; run it under jit."""
  encoded = encode_levels(tokenizer, images, key)
  out = decode_latents(tokenizer, jnp.asarray(encoded.quantized[:, -1]))
  distance = None if lpips is None else lpips(images, jnp.clip(out, -1, 1))
  return BatchResult.of(encoded, out, distance)


_features = jit_module(lambda lpips, images: lpips.features(images))
_distance = jit_module(lambda lpips, a, b: lpips.distance(a, b))


def lpips_from(
  lpips: LPIPS | None, originals: Float[Array | np.ndarray, "b h w 3"]
) -> Callable[[Float[Array, "b h w 3"]], Float[Array, "b"] | None]:
  """A function from reconstructions [B, H, W, 3] to their LPIPS [B] from `originals` in [-1, 1].

  The features of the originals are computed once. Reconstructions are clipped to [-1, 1]. Without
  a network the function returns None.
  """
  if lpips is None:
    return lambda images: None
  features = _features(lpips)
  real, distance = features(originals), _distance(lpips)
  return lambda images: distance(real, features(jnp.clip(images, -1, 1)))


def frozen_vae(tokenizer: Tokenizer) -> AutoencoderKL:
  """The continuous VAE that a tokenizer was adapted from: its own, without the adapters."""
  config, dtype = tokenizer.config.vae, tokenizer.vae.dtype
  make = lambda: AutoencoderKL(config, dtype=dtype, rngs=nnx.Rngs(0))
  own = arrays.of(tokenizer.vae)
  kept = {k: own[k] for k in weights.expected_shapes(make)}
  return weights.build(make, kept, "the tokenizer's VAE")
