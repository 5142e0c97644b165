"""The discrete tokenizer: an adapted continuous VAE around a residual quantizer."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from coda_jax.errors import UserError
from coda_jax.models.lora import LoRAConfig, add_lora
from coda_jax.models.quantizer import QuantizerConfig, ResidualQuantizer
from coda_jax.models.transform_quantizer import TransformConfig, TransformQuantizer
from coda_jax.models.vae import AutoencoderKL, VAEConfig


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Shape of a tokenizer.

  Attributes:
    vae: the continuous VAE.
    quantizer: it must be of the latent's side at `image_size`.
    lora: adapters on the VAE's convolutions, or None.
    image_size: side of the training images; other sizes work too.
  """

  vae: VAEConfig
  quantizer: QuantizerConfig | TransformConfig
  lora: LoRAConfig | None = None
  image_size: int = 256

  def __post_init__(self):
    side, _ = self.vae.latent_size(self.image_size, self.image_size)
    if self.quantizer.latent_side != side:
      raise UserError(
        f"quantizer.patch_sizes ends with {self.quantizer.patch_sizes[-1]}; images of "
        f"{self.image_size} have latents of {side}x{side}, so it must end with {side}"
      )
    if self.quantizer.channels != self.vae.z_channels:
      raise UserError(
        f"quantizer.code_dim is {self.quantizer.channels}, "
        f"but the VAE's latents have {self.vae.z_channels} channels"
      )


class Tokenizer(nnx.Module):
  """Images to lists of ids, coarse to fine, and back.

  `dtype` and `remat` are those of `AutoencoderKL`: how the VAE computes.
  """

  def __init__(
    self,
    config: TokenizerConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    rngs: nnx.Rngs,
  ):
    self.config = config
    vae = AutoencoderKL(config.vae, dtype=dtype, remat=remat, rngs=rngs)
    self.vae = add_lora(vae, config.lora, rngs=rngs)
    q = config.quantizer
    if isinstance(q, TransformConfig):
      self.quantizer = TransformQuantizer(q, rngs=rngs)
    else:
      self.quantizer = ResidualQuantizer(q, rngs=rngs)

  def latents(
    self, images: Float[Array, "b h w 3"], key: jax.Array | None = None
  ) -> Float[Array, "b p q c"]:
    """Scaled continuous latents: the posterior's mean, or a sample if `key` is given."""
    posterior = self.vae.encode(images)
    return self.vae.scale_latents(posterior.mean if key is None else posterior.sample(key))

  def encode(
    self, images: Float[Array, "b h w 3"], key: jax.Array | None = None
  ) -> list[Int[Array, "b _ _"]]:
    """Ids of images in [-1, 1], one int32 [B, ph, pw] per level, coarse to fine.

    Raises:
      UserError: what is given are no such images, or the VAE's stride does not divide their size.
    """
    return self.quantizer.encode(self.latents(images, key))

  def encode_flat(
    self, images: Float[Array, "b h w 3"]
  ) -> tuple[Int[Array, "b n"], Bool[Array, ""]]:
    """(ids of all levels in one row an image, whether the latents are finite), by the mean."""
    latents = self.latents(images)
    levels = [ids.reshape(len(images), -1) for ids in self.quantizer.encode(latents)]
    return jnp.concatenate(levels, 1), jnp.isfinite(latents).all()

  def decode(
    self, ids: list[Int[Array, "b _ _"]], size: int | tuple[int, int] | None = None
  ) -> Float[Array, "b h w 3"]:
    """Images in about [-1, 1] of all levels, or of the first k if only those are given.

    Args:
      ids: int32 [B, ph, pw] per level.
      size: height and width of the image, needed for fewer than all levels of an image of
        other than the training size.
    """
    if size is not None:
      size = self.config.vae.latent_size(*((size, size) if isinstance(size, int) else size))
    return self.vae.decode(self.vae.unscale_latents(self.quantizer.decode(ids, size)))

  def reconstruct(
    self,
    images: Float[Array, "b h w 3"],
    levels: int | None = None,
    key: jax.Array | None = None,
  ) -> Float[Array, "b h w 3"]:
    """Images through all levels of tokens, or the first `levels`, and back."""
    known = len(self.config.quantizer.patch_sizes)
    if levels is not None and not 1 <= levels <= known:
      raise UserError(f"levels is {levels}; the tokenizer has levels 1 to {known}")
    _, height, width, _ = images.shape
    return self.decode(self.encode(images, key)[:levels], (height, width))
