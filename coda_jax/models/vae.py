"""The KL autoencoder of latent diffusion; MAR's KL-16 and FLUX's VAE are two configs of it.

Attribute names are LDM's (`encoder.down.0.block.0.conv1`); what other libraries call the same
layers is known to `convert` only. Source: design of LDM's `AutoencoderKL`, as MAR and FLUX
publish it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from coda_jax.errors import UserError
from coda_jax.models.lora import Conv, LoRAConfig
from coda_jax.ops.group_norm import group_norm
from coda_jax.ops.platform import platform
from coda_jax.ops.recompute import after, compute_once, recompute


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

  def __post_init__(self):
    if self.ch % self.norm_groups:
      raise UserError(f"vae.ch is {self.ch}, not a multiple of norm_groups={self.norm_groups}")

  @property
  def downsampling(self) -> int:
    """Pixels per latent along one side."""
    return 2 ** (len(self.ch_mult) - 1)

  def latent_size(self, height: int, width: int) -> tuple[int, int]:
    """Latent height and width of an image. Raises UserError if the stride does not divide it."""
    f = self.downsampling
    if height % f or width % f or not height or not width:
      raise UserError(
        f"image size {height}x{width} is not a multiple of the VAE's stride {f}; resize or crop"
      )
    return height // f, width // f


MAR_VAE = VAEConfig()
FLUX_VAE = VAEConfig(
  ch_mult=(1, 2, 4, 4), encoder_attn=(), quant_conv=False, scale=0.3611, shift=0.1159
)


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
      noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
    return self.mean + jnp.exp(0.5 * self.logvar) * noise


class GroupNorm(nnx.Module):
  """Group normalisation, with swish behind it where asked (see `ops.group_norm`)."""

  def __init__(self, channels: int, groups: int):
    self.groups = groups
    self.scale = nnx.Param(jnp.ones(channels))
    self.bias = nnx.Param(jnp.zeros(channels))

  def __call__(self, x: Float[Array, "b h w c"], *, swish: bool = False) -> Float[Array, "b h w c"]:
    return group_norm(x, self.scale[...], self.bias[...], groups=self.groups, swish=swish)


class ResBlock(nnx.Module):
  """x + conv2(swish(norm2(conv1(swish(norm1(x)))))), 1x1 `nin_shortcut` where channels change."""

  def __init__(self, cin: int, cout: int, path: str, make: "_Maker"):
    self.norm1 = make.norm(cin)
    self.conv1 = make.conv(cin, cout, f"{path}.conv1")
    self.norm2 = make.norm(cout)
    self.conv2 = make.conv(cout, cout, f"{path}.conv2")
    if cin != cout:
      self.nin_shortcut = make.conv(cin, cout, f"{path}.nin_shortcut", kernel_size=1)
    self.path = path

  def steps(self) -> list[tuple[str, Callable]]:
    """The block cut behind each adapted convolution; see `Decoder.run`."""

    def first(x):
      return x, self.conv1(self.norm1(x, swish=True))

    def second(carry):
      x, h = carry
      shortcut = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
      return shortcut + self.conv2(self.norm2(h, swish=True))

    return [(f"{self.path}.conv1", first), (f"{self.path}.conv2", second)]


class AttnBlock(nnx.Module):
  """Single-head self-attention over all positions, residual."""

  def __init__(self, channels: int, path: str, make: "_Maker"):
    self.norm = make.norm(channels)
    for name in ("q", "k", "v", "proj_out"):
      setattr(self, name, make.conv(channels, channels, f"{path}.{name}", kernel_size=1))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    b, h, w, c = x.shape
    y = self.norm(x)
    q, k, v = (f(y).reshape(b, h * w, 1, c) for f in (self.q, self.k, self.v))
    return x + self.proj_out(jax.nn.dot_product_attention(q, k, v).reshape(b, h, w, c))


class Downsample(nnx.Module):
  """Stride-2 convolution, padded by one below and to the right."""

  def __init__(self, channels: int, path: str, make: "_Maker"):
    self.conv = make.conv(channels, channels, f"{path}.conv", stride=2, padding=((0, 1), (0, 1)))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    # Late in the backward pass, as the kernel is there (see `recompute`); so in `Upsample`.
    return self.conv(after(self.conv.kernel[...], x))


class Upsample(nnx.Module):
  """Nearest-neighbour doubling, then a convolution."""

  def __init__(self, channels: int, path: str, make: "_Maker"):
    self.conv = make.conv(channels, channels, f"{path}.conv")

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q c"]:
    b, h, w, c = x.shape
    x = after(self.conv.kernel[...], x)  # or what is held is the doubled x
    x = jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c))
    return self.conv(x.reshape(b, 2 * h, 2 * w, c))


# What the backward pass computes anew: nothing by name (the compiler decides), what lies between
# convolutions, everything within a residual block, or "blocks" on CPUs and "none" elsewhere.
REMAT = ("none", "convs", "blocks", "auto")


def _run(layers: Sequence[Sequence[Callable]], carry, remat: str):
  """Runs layers, each cut into steps, one after the other."""
  if remat == "auto":
    remat = "blocks" if platform() == "cpu" else "none"
  for layer in layers:
    layer = [functools.partial(_held_once, step) for step in layer]
    # On CPUs a block's steps, too, so that one's activations go before the next one's come.
    by_step = remat == "convs" or (remat == "blocks" and platform() == "cpu")
    if by_step:
      layer = list(map(recompute, layer))

    def whole(carry, steps=layer):
      for step in steps:
        carry = step(carry)
      return carry

    if remat == "blocks" and not (by_step and len(layer) == 1):
      whole = recompute(whole)
    carry = whole(carry)
  return carry


def _held_once(step: Callable, carry):
  """A step, of whose result not the convolution and its bias or residual are held, but the sum."""
  *passed, last = jax.tree.leaves(out := step(carry))
  return jax.tree.unflatten(jax.tree.structure(out), [*passed, compute_once(last)])


@dataclasses.dataclass
class _Maker:
  """Makes the layers of one autoencoder: knows the norm's groups and who gets an adapter."""

  groups: int
  lora: LoRAConfig | None
  rngs: nnx.Rngs
  fold: bool = False

  def norm(self, channels: int) -> GroupNorm:
    return GroupNorm(channels, self.groups)

  def conv(self, cin: int, cout: int, path: str, kernel_size: int = 3, **kwargs) -> Conv:
    rank = self.lora.rank_for(path) if self.lora else 0
    return Conv(cin, cout, kernel_size, rank=rank, fold=self.fold, rngs=self.rngs, **kwargs)


class Middle(nnx.Module):
  """Block, attention, block at the lowest resolution."""

  def __init__(self, channels: int, path: str, make: _Maker):
    self.block_1 = ResBlock(channels, channels, f"{path}.block_1", make)
    self.attn_1 = AttnBlock(channels, f"{path}.attn_1", make)
    self.block_2 = ResBlock(channels, channels, f"{path}.block_2", make)


class Level(nnx.Module):
  """The blocks of one resolution, with attention after each where asked, and its resampling."""

  def __init__(self, cin: int, cout: int, blocks: int, attention: bool, path: str, make: _Maker):
    self.block = nnx.List(
      [ResBlock(cin if i == 0 else cout, cout, f"{path}.block.{i}", make) for i in range(blocks)]
    )
    if attention:
      self.attn = nnx.List([AttnBlock(cout, f"{path}.attn.{i}", make) for i in range(blocks)])

  def layers(self) -> list[nnx.Module]:
    attn = list(self.attn) if hasattr(self, "attn") else [None] * len(self.block)
    return [m for pair in zip(self.block, attn, strict=True) for m in pair if m is not None]


class Encoder(nnx.Module):
  """Images to posterior moments before `quant_conv`."""

  def __init__(self, config: VAEConfig, make: _Maker, remat: str = "none"):
    widths = [config.ch * m for m in config.ch_mult]
    self.remat = remat
    self.conv_in = make.conv(3, config.ch, "encoder.conv_in")
    self.down = nnx.List([])
    for i, (cin, cout) in enumerate(zip([config.ch, *widths], widths, strict=False)):
      path = f"encoder.down.{i}"
      attention = i in config.encoder_attn
      level = Level(cin, cout, config.encoder_blocks, attention, path, make)
      if i < len(widths) - 1:
        level.downsample = Downsample(cout, f"{path}.downsample", make)
      self.down.append(level)
    self.mid = Middle(widths[-1], "encoder.mid", make)
    self.norm_out = make.norm(widths[-1])
    self.conv_out = make.conv(widths[-1], 2 * config.z_channels, "encoder.conv_out")

  def layers(self) -> list[list[Callable]]:
    """Every layer up to `norm_out` as its steps.

    `conv_in` and each downsample belong to the block beside them: what lies between is as large
    as anything, and cheap to compute again.
    """
    layers = []
    for level in self.down:
      layers += [[module] for module in level.layers()]
      if hasattr(level, "downsample"):
        layers[-1].append(level.downsample)
    layers[0].insert(0, self.conv_in)
    layers += [[self.mid.block_1], [self.mid.attn_1], [self.mid.block_2]]
    return [[step for module in layer for _, step in _steps_of(module)] for layer in layers]

  def __call__(self, x: Float[Array, "b h w 3"]) -> Float[Array, "b p q c"]:
    x = _run(self.layers(), x, self.remat)
    return self.conv_out(self.norm_out(x, swish=True))


def _steps_of(layer: nnx.Module) -> list[tuple[str, Callable]]:
  return layer.steps() if isinstance(layer, ResBlock) else [("", layer)]


class Decoder(nnx.Module):
  """Latents behind `post_quant_conv` to images. `up.0` is the full resolution, as in LDM."""

  def __init__(self, config: VAEConfig, make: _Maker, remat: str = "none"):
    widths = [config.ch * m for m in config.ch_mult]
    self.remat = remat
    self.conv_in = make.conv(config.z_channels, widths[-1], "decoder.conv_in")
    self.mid = Middle(widths[-1], "decoder.mid", make)
    up = []
    cin = widths[-1]
    for i in reversed(range(len(widths))):
      path = f"decoder.up.{i}"
      attention = i in config.decoder_attn
      level = Level(cin, widths[i], config.decoder_blocks, attention, path, make)
      if i > 0:
        level.upsample = Upsample(widths[i], f"{path}.upsample", make)
      up.insert(0, level)
      cin = widths[i]
    self.up = nnx.List(up)
    self.norm_out = make.norm(widths[0])
    self.conv_out = make.conv(widths[0], 3, "decoder.conv_out")

  def layers(self) -> list[list[tuple[str, Callable]]]:
    """Every layer as its steps: (name of the adapted convolution it ends with or "", function)."""
    out = [[("", self.conv_in)]]
    for layer in (self.mid.block_1, self.mid.attn_1, self.mid.block_2):
      out.append(_steps_of(layer))
    for i in reversed(range(len(self.up))):
      out += map(_steps_of, self.up[i].layers())
      if i > 0:
        out.append([(f"decoder.up.{i}.upsample.conv", self.up[i].upsample)])
    out.append([("", lambda x: self.conv_out(self.norm_out(x, swish=True)))])
    return out

  def steps(self) -> list[tuple[str, Callable]]:
    """The steps of all layers, in order."""
    return list(itertools.chain(*self.layers()))

  def run(self, carry, start: int = 0, stop: int | None = None):
    """Runs steps `start` to `stop`. Training cuts the decoder behind its adaptive layer with it.

    The carry is an array, or (input, branch) inside a residual block.
    """
    layers, number = self.layers(), itertools.count()
    wanted = range(sum(map(len, layers)))[start:stop]
    chosen = [[step for _, step in layer if next(number) in wanted] for layer in layers]
    return _run(chosen, carry, self.remat)

  def step_index(self, name: str) -> int:
    """Index of the step that ends with convolution `name`. Raises UserError with the candidates."""
    names = [n for n, _ in self.steps()]
    if not name or name not in names:
      there = ", ".join(filter(None, names))
      raise UserError(f"no adaptive layer {name!r}; the decoder has {there}")
    return names.index(name)

  def __call__(self, z: Float[Array, "b p q c"]) -> Float[Array, "b h w 3"]:
    return self.run(z)


class AutoencoderKL(nnx.Module):
  """Continuous image VAE with raw (unscaled) latents.

  Args:
    config: its shape.
    lora: adapters to add, or None.
    dtype: of the computation; parameters, moments and images stay float32.
    fold: add adapters to the kernels instead of the outputs (see `Conv`).
    remat: one of `REMAT`.
  """

  def __init__(
    self,
    config: VAEConfig,
    *,
    lora: LoRAConfig | None = None,
    dtype: DTypeLike = jnp.float32,
    fold: bool = False,
    remat: str = "none",
    rngs: nnx.Rngs,
  ):
    make = _Maker(config.norm_groups, lora, rngs, fold)
    self.config, self.dtype = config, dtype
    self.encoder = Encoder(config, make, remat)
    self.decoder = Decoder(config, make, remat)
    if config.quant_conv:
      z = config.z_channels
      self.quant_conv = make.conv(2 * z, 2 * z, "quant_conv", kernel_size=1)
      self.post_quant_conv = make.conv(z, z, "post_quant_conv", kernel_size=1)

  def encode(self, images: Float[Array, "b h w 3"]) -> Posterior:
    """Posterior of images in [-1, 1]. Raises UserError if the stride does not divide the size."""
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
    return self.decoder(self.decoder_input(z)).astype(jnp.float32)

  def scale_latents(self, z: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Raw latents to the scale that quantizers and generators see."""
    return (z - self.config.shift) * self.config.scale

  def unscale_latents(self, x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Inverse of `scale_latents`."""
    return x / self.config.scale + self.config.shift
