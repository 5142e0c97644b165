"""The KL autoencoder of latent diffusion; MAR's KL-16, FLUX's VAE and others are configs of it.

Attribute names are LDM's (`encoder.down.0.block.0.conv1`); only `convert` knows other names.
`models.lora.add_lora` adds adapters. Source: LDM's `AutoencoderKL` (arXiv 2112.10752), as MAR and
FLUX publish it, and `AutoencoderKL` and `AutoencoderKLFlux2` of diffusers.
"""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from coda_jax.errors import UserError
from coda_jax.models.inputs import check_images, check_latents
from coda_jax.models.latent_norm import LatentNorm


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Shape of a KL autoencoder.

  Attributes:
    ch: channels at full resolution.
    ch_mult: multiple of `ch` per level, full resolution first; every level but the last halves.
    z_channels: channels of the latent.
    encoder_blocks, decoder_blocks: residual blocks per level.
    encoder_attn, decoder_attn: levels with attention after each block (the middle always has one).
    quant_conv: 1x1 convolutions around the latent (MAR), or none (FLUX).
    scale, shift: latent that generators and quantizers see = (z - shift) * scale.
    norm_groups: groups of every GroupNorm.
    norm_patch: side of the patches of latents that statistics of their own normalise before scale
      and shift (FLUX.2), or 0.
  """

  ch: int = 128
  ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  z_channels: int = 16
  encoder_blocks: int = 2
  decoder_blocks: int = 3
  encoder_attn: tuple[int, ...] = (4,)
  decoder_attn: tuple[int, ...] = ()
  quant_conv: bool = True
  scale: float = 0.2325
  shift: float = 0.0
  norm_groups: int = 32
  norm_patch: int = 0

  def __post_init__(self):
    if self.ch % self.norm_groups:
      raise UserError(f"vae.ch is {self.ch}, not a multiple of norm_groups={self.norm_groups}")

  @property
  def downsampling(self) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(self.ch_mult) - 1)

  @property
  def stride(self) -> int:
    """Both sides of an image must be multiples of it, in pixels."""
    return self.downsampling * max(1, self.norm_patch)

  def latent_size(self, height: int, width: int) -> tuple[int, int]:
    """Latent height and width of an image. Raises UserError if the stride does not divide it."""
    stride = self.stride
    if height % stride or width % stride or not height or not width:
      size = f"{height}x{width}"
      raise UserError(
        f"image size {size} is not a multiple of the VAE's stride {stride}; resize or crop"
      )
    return height // self.downsampling, width // self.downsampling


MAR_VAE = VAEConfig()
FLUX_VAE = VAEConfig(
  ch_mult=(1, 2, 4, 4), encoder_attn=(), quant_conv=False, scale=0.3611, shift=0.1159
)
SD3_VAE = dataclasses.replace(FLUX_VAE, scale=1.5305, shift=0.0609)
SD_VAE = dataclasses.replace(FLUX_VAE, z_channels=4, quant_conv=True, scale=0.18215, shift=0.0)
FLUX2_VAE = dataclasses.replace(SD_VAE, z_channels=32, scale=1.0, norm_patch=2)


@struct.dataclass
class Posterior:
  """Diagonal Gaussian over raw latents.

  Attributes:
    mean, logvar: [B, h, w, z_channels] float32; logvar within [-30, 20].
  """

  mean: jax.Array
  logvar: jax.Array

  def sample(self, key: jax.Array | None = None, noise: jax.Array | None = None) -> jax.Array:
    """One draw, from `key` or from given standard normal `noise` of the mean's shape."""
    if noise is None:
      assert key is not None, "give a key or noise"
      noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
    return self.mean + jnp.exp(0.5 * self.logvar) * noise


class GroupNorm(nnx.Module):
  """Group normalisation, eps 1e-6, with statistics in float32 and the result in the type of x.

  Both moments are taken in one sweep over x, of the distances d to one element of each group:
  far from 0, E[d²] − E[d]² keeps the digits that E[x²] − E[x]² (`nnx.GroupNorm`) loses. Sums run
  over positions first, so that channels stay along the last axis.
  """

  def __init__(self, channels: int, groups: int):
    self.groups = groups
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    def of_group(f, y):
      grouped = y.reshape(len(y), 1, 1, self.groups, -1)
      return jnp.broadcast_to(f(grouped), grouped.shape).reshape(y.shape)

    def mean(y):
      return of_group(lambda g: g.mean(-1, keepdims=True), y.mean((1, 2), keepdims=True))

    y = x.astype(jnp.float32)
    distance = y - jax.lax.stop_gradient(of_group(lambda g: g[..., :1], y[:, :1, :1]))
    centre = mean(distance)
    variance = jnp.maximum(mean(jnp.square(distance)) - jnp.square(centre), 0.0)
    factor = jax.lax.rsqrt(variance + 1e-6) * self.scale[...]
    return (distance * factor + (self.bias[...] - centre * factor)).astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class _Layers:
  """Makes the layers of one autoencoder."""

  groups: int
  dtype: DTypeLike
  remat: bool
  rngs: nnx.Rngs

  def norm(self, channels: int) -> GroupNorm:
    return GroupNorm(channels, self.groups)

  def conv(self, cin: int, cout: int, size: int = 3, **kwargs) -> nnx.Conv:
    kwargs = {"strides": (1, 1), "padding": ((size // 2, size // 2),) * 2} | kwargs
    return nnx.Conv(cin, cout, (size, size), dtype=self.dtype, rngs=self.rngs, **kwargs)


class ResBlock(nnx.Module):
  """x + conv2(swish(norm2(conv1(swish(norm1(x)))))), 1x1 `nin_shortcut` where channels change."""

  def __init__(self, cin: int, cout: int, layers: _Layers):
    self.norm1, self.conv1 = layers.norm(cin), layers.conv(cin, cout)
    self.norm2, self.conv2 = layers.norm(cout), layers.conv(cout, cout)
    self.nin_shortcut = layers.conv(cin, cout, 1) if cin != cout else None
    self.remat = layers.remat

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
    return jax.checkpoint(self._forward)(x) if self.remat else self._forward(x)

  def _forward(self, x):
    h = self.conv1(nnx.swish(self.norm1(x)))
    h = self.conv2(nnx.swish(self.norm2(h)))
    return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class AttnBlock(nnx.Module):
  """Single-head self-attention over all positions, residual."""

  def __init__(self, channels: int, layers: _Layers):
    self.norm = layers.norm(channels)
    self.q, self.k, self.v, self.proj_out = (layers.conv(channels, channels, 1) for _ in range(4))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    y = self.norm(x)
    q, k, v = (f(y).reshape(b, h * w, 1, c) for f in (self.q, self.k, self.v))
    return x + self.proj_out(jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c))


class Downsample(nnx.Module):
  """Stride-2 convolution, padded by one below and to the right."""

  def __init__(self, channels: int, layers: _Layers):
    self.conv = layers.conv(channels, channels, strides=(2, 2), padding=((0, 1), (0, 1)))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    return self.conv(x)


class Upsample(nnx.Module):
  """Nearest-neighbour doubling, then a convolution."""

  def __init__(self, channels: int, layers: _Layers):
    self.conv = layers.conv(channels, channels)

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return self.conv(x.reshape(b, 2 * h, 2 * w, c))


class Middle(nnx.Module):
  """Block, attention, block at the lowest resolution."""

  def __init__(self, channels: int, layers: _Layers):
    self.block_1 = ResBlock(channels, channels, layers)
    self.attn_1 = AttnBlock(channels, layers)
    self.block_2 = ResBlock(channels, channels, layers)

  def named_layers(self) -> list[tuple[str, Callable]]:
    return [(name, getattr(self, name)) for name in ("block_1", "attn_1", "block_2")]


class Level(nnx.Module):
  """The blocks of one resolution, with attention after each where asked, and its resampling."""

  downsample: Downsample  # of the encoder's levels but the last
  upsample: Upsample  # of the decoder's levels but `up.0`

  def __init__(self, cin: int, cout: int, blocks: int, attention: bool, layers: _Layers):
    widths = [cin] + [cout] * blocks
    self.block = nnx.List([ResBlock(*io, layers) for io in itertools.pairwise(widths)])
    if attention:
      self.attn = nnx.List([AttnBlock(cout, layers) for _ in range(blocks)])

  def named_layers(self) -> list[tuple[str, Callable]]:
    """Every layer in order, by its path below the level."""
    named = []
    for i, block in enumerate(self.block):
      named.append((f"block.{i}", block))
      if hasattr(self, "attn"):
        named.append((f"attn.{i}", self.attn[i]))
    resample = [name for name in ("downsample", "upsample") if hasattr(self, name)]
    return named + [(name, getattr(self, name)) for name in resample]


class Encoder(nnx.Module):
  """Images to posterior moments before `quant_conv`."""

  def __init__(self, config: VAEConfig, layers: _Layers):
    widths = [config.ch * m for m in config.ch_mult]
    self.conv_in = layers.conv(3, config.ch)
    self.down = nnx.List([])
    for i, io in enumerate(itertools.pairwise([config.ch, *widths])):
      level = Level(*io, config.encoder_blocks, i in config.encoder_attn, layers)
      if i < len(widths) - 1:
        level.downsample = Downsample(widths[i], layers)
      self.down.append(level)
    self.mid = Middle(widths[-1], layers)
    self.norm_out = layers.norm(widths[-1])
    self.conv_out = layers.conv(widths[-1], 2 * config.z_channels)

  def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b p q c"]:
    x = self.conv_in(x)
    for stage in (*self.down, self.mid):
      for _, layer in stage.named_layers():
        x = layer(x)
    return self.conv_out(nnx.swish(self.norm_out(x)))


class Decoder(nnx.Module):
  """Latents behind `post_quant_conv` to images. `up.0` is the full resolution, as in LDM."""

  def __init__(self, config: VAEConfig, layers: _Layers):
    widths = [config.ch * m for m in config.ch_mult]
    self.conv_in = layers.conv(config.z_channels, widths[-1])
    self.mid = Middle(widths[-1], layers)
    self.up = nnx.List([])
    for i, (cout, cin) in enumerate(itertools.pairwise([*widths, widths[-1]])):
      level = Level(cin, cout, config.decoder_blocks, i in config.decoder_attn, layers)
      if i > 0:
        level.upsample = Upsample(cout, layers)
      self.up.append(level)
    self.norm_out = layers.norm(widths[0])
    self.conv_out = layers.conv(widths[0], 3)

  def named_layers(self) -> list[tuple[str, Callable]]:
    """Every layer in the order in which it runs, by its path below the decoder."""
    stages = [("mid", self.mid)] + [(f"up.{i}", up) for i, up in reversed([*enumerate(self.up)])]
    between = [(f"{s}.{name}", f) for s, stage in stages for name, f in stage.named_layers()]
    last = [("norm_out", lambda x: nnx.swish(self.norm_out(x))), ("conv_out", self.conv_out)]
    return [("conv_in", self.conv_in), *between, *last]

  def __call__(
    self, x: Float[Array, "b p q c"], start: str | None = None, stop: str | None = None
  ) -> Float[Array, "b h w d"]:
    """Runs the layers from `start` (the first by default) up to, without, `stop`."""
    names, layers = zip(*self.named_layers(), strict=True)
    first = names.index(start) if start else 0
    for layer in layers[first : names.index(stop) if stop else None]:
      x = layer(x)
    return x


class AutoencoderKL(nnx.Module):
  """Continuous image VAE with raw (unscaled) latents.

  Args:
    config: its shape.
    dtype: of the computation; parameters, moments and images stay float32.
    remat: rematerialise residual blocks in the backward pass instead of saving their activations.
  """

  def __init__(
    self,
    config: VAEConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    rngs: nnx.Rngs,
  ):
    layers = _Layers(config.norm_groups, dtype, remat, rngs)
    self.config, self.dtype = config, dtype
    self.encoder, self.decoder = Encoder(config, layers), Decoder(config, layers)
    if config.quant_conv:
      z = config.z_channels
      self.quant_conv = layers.conv(2 * z, 2 * z, 1)
      self.post_quant_conv = layers.conv(z, z, 1)
    if config.norm_patch:
      self.latent_norm = LatentNorm(config.norm_patch, config.z_channels)

  def encode(self, images: Float[Array, "b h w 3"]) -> Posterior:
    """Posterior of images in [-1, 1].

    Raises:
      UserError: what is given are no such images, or the stride does not divide their size.
    """
    check_images(images)
    self.config.latent_size(*images.shape[1:3])
    x = self.encoder(images.astype(self.dtype))
    if self.config.quant_conv:
      x = self.quant_conv(x)
    mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))

  def decoder_input(self, z: Float[Array, "b p q c"]) -> Float[Array, "b p q c"]:
    """Raw latents as the decoder takes them."""
    z = z.astype(self.dtype)
    return self.post_quant_conv(z) if self.config.quant_conv else z

  def decode(self, z: Float[Array, "b p q c"]) -> Float[Array, "b h w 3"]:
    """Images in about [-1, 1] (not clipped), float32, from raw latents."""
    check_latents(z, self.config.z_channels, "raw latents")
    return self.decoder(self.decoder_input(z)).astype(jnp.float32)

  def scale_latents(self, z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Raw latents to the scale that quantizers and generators see."""
    if self.config.norm_patch:
      z = self.latent_norm.normalize(z)
    return (z - self.config.shift) * self.config.scale

  def unscale_latents(self, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Inverse of `scale_latents`."""
    z = x / self.config.scale + self.config.shift
    return self.latent_norm.denormalize(z) if self.config.norm_patch else z
