"""What a tokenizer keeps of images: quality, error and code usage of each of its levels.

`encode_levels`, `decode_latents` and `reconstruct_batch` are pure functions of a module and
arrays, for use under `jax.jit`; `jit_module` does that for callers without a step of their own.
`ReconstructionMetrics` collects on the host what they return.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jaxtyping import Array, Bool, Float, Int, UInt8

from coda_jax import arrays, weights
from coda_jax.arrays import jit_module
from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.image_quality import psnr, ssim, to_uint8
from coda_jax.models.lpips import LPIPS
from coda_jax.models.tokenizer import Tokenizer
from coda_jax.models.vae import AutoencoderKL
from coda_jax.ops.resize import area_resize, bicubic_resize


@struct.dataclass
class Encoded:
  """A batch of images in latent space.

  Attributes:
    ids: int32 [B, ph, pw] per level, coarse to fine.
    latents: [B, h, w, C] continuous, scaled.
    quantized: [L, B, h, w, C] what the first 1 to L levels make of them.
  """

  ids: list[jax.Array]
  latents: jax.Array
  quantized: jax.Array

  @property
  def level_errors(self) -> Float[Array, "b levels"]:
    """Mean squared error of each image's latents after each level: the quantization error."""
    return jnp.square(self.latents - self.quantized).mean((2, 3, 4)).T

  def level_inputs(self) -> list[Float[Array, "n c"]]:
    """What each level looks up: the area-pooled residual of the levels before it, flattened."""
    before = [jnp.zeros_like(self.latents), *self.quantized[:-1]]
    pooled = (
      area_resize(self.latents - q, tuple(ids.shape[1:]))
      for q, ids in zip(before, self.ids, strict=True)
    )
    return [x.reshape(-1, x.shape[-1]) for x in pooled]


def encode_levels(
  tokenizer: Tokenizer, images: Float[Array, "b h w 3"], key: jax.Array | None = None
) -> Encoded:
  """Ids of images in [-1, 1] and the latents after every level.

  Takes the posterior's mean, or a sample if `key` is given.
  """
  latents = tokenizer.latents(images, key)
  ids = tokenizer.quantizer.encode(latents)
  values = tokenizer.quantizer.values()
  steps = jnp.stack([bicubic_resize(values[i], latents.shape[1:3]) for i in ids])
  return Encoded(ids, latents, jnp.cumsum(steps, axis=0))


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
  """What `reconstruct_batch` makes of a batch.

  Attributes:
    images: [B, H, W, 3] reconstructions, not clipped.
    ids: int32 [B, ph, pw] per level.
    level_errors: [B, L] quantization error after each level.
    latent_mean: [B, C], latent_power: [B], mean and mean square of the continuous latents.
    lpips: [B], or None without its weights.
  """

  images: jax.Array
  ids: list[jax.Array]
  level_errors: jax.Array
  latent_mean: jax.Array
  latent_power: jax.Array
  lpips: jax.Array | None

  @classmethod
  def of(
    cls, encoded: Encoded, images: Float[Array, "b h w 3"], lpips: Float[Array, "b"] | None
  ) -> "BatchResult":
    """Of a batch encoded, decoded from all levels, and compared."""
    return cls(
      images=images,
      ids=encoded.ids,
      level_errors=encoded.level_errors,
      latent_mean=encoded.latents.mean((1, 2)),
      latent_power=jnp.square(encoded.latents).mean((1, 2, 3)),
      lpips=lpips,
    )


def reconstruct_batch(
  tokenizer: Tokenizer,
  images: Float[Array, "b h w 3"],
  lpips: LPIPS | None = None,
  key: jax.Array | None = None,
) -> BatchResult:
  """All that `ReconstructionMetrics` needs of a batch of images in [-1, 1]; run it under jit."""
  encoded = encode_levels(tokenizer, images, key)
  out = decode_latents(tokenizer, encoded.quantized[-1])
  distance = None if lpips is None else lpips(images, jnp.clip(out, -1, 1))
  return BatchResult.of(encoded, out, distance)


@dataclasses.dataclass(frozen=True)
class Quality:
  """Likeness of N reconstructions to their originals.

  Attributes:
    psnr: [N] in dB, ssim: [N], both of 8-bit images by the official definition.
    lpips: [N] of float images, or None.
  """

  psnr: np.ndarray
  ssim: np.ndarray
  lpips: np.ndarray | None = None

  @classmethod
  def of(
    cls,
    images: UInt8[np.ndarray, "n h w 3"],
    reconstructions: Float[np.ndarray, "n h w 3"],
    lpips: Float[np.ndarray | Array, "n"] | None = None,
  ) -> "Quality":
    """Of originals and what was made of them, in about [-1, 1]."""
    ours = to_uint8(reconstructions)
    # SSIM's window does not fit into images of less than 11 pixels.
    similarity = (
      ssim(images, ours) if min(images.shape[1:3]) >= 11 else np.full(len(images), np.nan)
    )
    return cls(psnr(images, ours), similarity, None if lpips is None else np.asarray(lpips))

  def merge(self, other: "Quality") -> "Quality":
    lpips = None if self.lpips is None else np.concatenate([self.lpips, other.lpips])
    return Quality(
      np.concatenate([self.psnr, other.psnr]), np.concatenate([self.ssim, other.ssim]), lpips
    )

  def take(self, rows: Int[np.ndarray, "m"]) -> "Quality":
    """Of some of the images."""
    return Quality(
      self.psnr[rows], self.ssim[rows], None if self.lpips is None else self.lpips[rows]
    )

  def means(self) -> dict[str, float]:
    """Means over images by name; `lpips` only if it was measured."""
    found = {"psnr": self.psnr, "ssim": self.ssim, "lpips": self.lpips}
    return {name: float(np.mean(x)) for name, x in found.items() if x is not None}


@dataclasses.dataclass(frozen=True)
class ReconstructionMetrics:
  """Everything measured of a tokenizer on N images; `merge` adds other images or hosts.

  Attributes:
    quality: likeness of the reconstructions.
    level_errors: [N, L] quantization error after each level.
    latent_mean: [N, C], latent_power: [N].
    usage: counts of every code at every level.
  """

  quality: Quality
  level_errors: np.ndarray
  latent_mean: np.ndarray
  latent_power: np.ndarray
  usage: CodebookUsage

  @classmethod
  def of(
    cls,
    result: BatchResult,
    images: UInt8[np.ndarray, "b h w 3"],
    codebook_size: int,
    valid: Bool[np.ndarray, "b"] | None = None,
  ) -> "ReconstructionMetrics":
    """Of one batch; rows that are not `valid` (padding) are left out."""
    rows = np.ones(len(images), bool) if valid is None else valid

    def take(x):
      return np.asarray(x)[rows]

    lpips = None if result.lpips is None else take(result.lpips)
    return cls(
      Quality.of(images[rows], take(result.images), lpips),
      take(result.level_errors),
      take(result.latent_mean),
      take(result.latent_power),
      CodebookUsage.of([take(i) for i in result.ids], codebook_size),
    )

  def merge(self, other: "ReconstructionMetrics") -> "ReconstructionMetrics":
    return ReconstructionMetrics(
      self.quality.merge(other.quality),
      np.concatenate([self.level_errors, other.level_errors]),
      np.concatenate([self.latent_mean, other.latent_mean]),
      np.concatenate([self.latent_power, other.latent_power]),
      self.usage.merge(other.usage),
    )

  @property
  def count(self) -> int:
    """Number of images N."""
    return len(self.level_errors)

  @property
  def latent_variance(self) -> float:
    """Variance of the continuous latents, mean over channels: the error of no quantizer at all."""
    means = np.mean(self.latent_mean, axis=0, dtype=np.float64)
    return float(np.mean(self.latent_power, dtype=np.float64) - np.mean(np.square(means)))

  def summary(self) -> dict[str, float]:
    """Scalars by name; levels count from 1. What a trainer logs of an evaluation."""
    errors = self.level_errors.mean(axis=0)
    usage = self.usage
    levels = range(len(errors))
    return {
      **self.quality.means(),
      "quantization_error": float(errors[-1]),
      "codebook_utilization": usage.utilization,
      "codebook_perplexity": usage.perplexity,
      "tokens_per_code": usage.tokens_per_code,
      **{f"quantization_error/level_{i + 1}": float(errors[i]) for i in levels},
      **{f"codebook_utilization/level_{i + 1}": float(usage.level_utilization[i]) for i in levels},
    }


def frozen_vae(tokenizer: Tokenizer) -> AutoencoderKL:
  """The continuous VAE that a tokenizer was adapted from: its own, without the adapters."""
  config, dtype = tokenizer.config.vae, tokenizer.vae.dtype
  make = lambda: AutoencoderKL(config, dtype=dtype, rngs=nnx.Rngs(0))  # noqa: E731
  own = arrays.of(tokenizer.vae)
  kept = {k: own[k] for k in weights.expected_shapes(make)}
  return weights.build(make, kept, "the tokenizer's VAE")


def in_batches(
  images: UInt8[np.ndarray, "n h w 3"], size: int
) -> Sequence[tuple[np.ndarray, np.ndarray]]:
  """(images, valid) batches of one shape; the last repeats its last image."""
  out = []
  size = min(size, len(images))
  for start in range(0, len(images), size):
    rows = np.arange(start, start + size)
    out.append((images[np.minimum(rows, len(images) - 1)], rows < len(images)))
  return out


class LPIPSDistance:
  """LPIPS of many reconstructions of the same images, whose features are computed once.

  `LPIPSDistance(lpips)(originals)(reconstructions)` are distances [B] of images in about [-1, 1],
  the reconstructions clipped to it; None without a network.
  """

  def __init__(self, lpips: LPIPS | None):
    self._features = lpips and _lpips_features(lpips)
    self._distance = lpips and _lpips_distance(lpips)

  def __call__(self, originals: Float[np.ndarray | Array, "b h w 3"]) -> Callable:
    if self._features is None:
      return lambda _: None
    real = self._features(originals)
    return lambda made: self._distance(real, self._features(jnp.clip(made, -1, 1)))


_lpips_features = jit_module(lambda lpips, images: lpips.features(images))
_lpips_distance = jit_module(lambda lpips, a, b: lpips.distance(a, b))
