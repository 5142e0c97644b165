"""Multi-scale residual quantizer with attention or Euclidean look-up (paper, section 4).

At each level the residual is area-pooled to p x p, every vector is looked up in one shared
codebook, and the values, bicubically upsampled, are added to the reconstruction and taken from
the residual. Nothing is detached along the chain.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from coda_jax.errors import UserError
from coda_jax.ops import codebook_lookup as lookup
from coda_jax.ops.resize import area_resize, bicubic_resize

_LOOKUPS = ("attention", "euclidean")
_NORMS = ("rms", "layer", "none")

# Sides of the token grids that the paper takes for images of 256 pixels: 680 and 2240 tokens.
MAR_PATCH_SIZES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
FLUX_PATCH_SIZES = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
  """Shape of the quantizer.

  Attributes:
    codebook_size: number of codes V.
    patch_sizes: side of each level's token grid, coarse to fine; the last is the latent's side.
    code_dim: channels of latents and codes.
    lookup: "attention" (paper, Eq. 6 to 8) or "euclidean" (plain VQ; residual VQ with more levels).
    attn_dim: width of queries and keys.
    norm: of queries and keys: "rms", "layer" or "none".
    beta: weight of the loss that pulls codes to latents (attention) or latents to codes
      (euclidean); None is 0.05 or 0.25.
    entropy_temperature: tau of the entropy loss.
    chunk_size: tokens at a time in the streamed look-up; None leaves it to the look-up.
  """

  codebook_size: int
  patch_sizes: tuple[int, ...]
  code_dim: int = 16
  lookup: str = "attention"
  attn_dim: int = 32
  norm: str = "rms"
  beta: float | None = None
  entropy_temperature: float = 0.01
  chunk_size: int | None = None

  def __post_init__(self):
    if self.codebook_size < 1:
      raise UserError(f"quantizer.codebook_size is {self.codebook_size}; it must be at least 1")
    if self.lookup not in _LOOKUPS:
      raise UserError(f"quantizer.lookup is {self.lookup!r}; it is one of {', '.join(_LOOKUPS)}")
    if self.norm not in _NORMS:
      raise UserError(f"quantizer.norm is {self.norm!r}; it is one of {', '.join(_NORMS)}")
    if not self.patch_sizes or min(self.patch_sizes) < 1:
      raise UserError(f"quantizer.patch_sizes is {self.patch_sizes}; give sides of at least 1")
    if self.chunk_size is not None and self.chunk_size < 1:
      raise UserError(f"quantizer.chunk_size is {self.chunk_size}; it must be at least 1")

  @property
  def tokens(self) -> int:
    """Tokens of an image of the training size."""
    return sum(p * p for p in self.patch_sizes)

  def level_sizes(self, h: int, w: int) -> list[tuple[int, int]]:
    """Token grid of every level for latents of h x w.

    Level l has round(p_l * h / h0) x round(p_l * w / w0) tokens, at least 1; the last is h x w.
    """
    last = self.patch_sizes[-1]

    def side(p, n):  # rounds halves up, in integers
      return n if p == last else max(1, (2 * p * n + last) // (2 * last))

    sizes = [(side(p, h), side(p, w)) for p in self.patch_sizes]
    return [*sizes[:-1], (h, w)]


@struct.dataclass
class QuantizerOutput:
  """What the quantizer makes of latents [B, h, w, C].

  Attributes:
    ids: one int32 [B, ph, pw] per level, coarse to fine.
    latents: [B, h, w, C] quantized, with straight-through gradients.
    vq_loss: L_q averaged over levels (paper, Eq. 10 and 11).
    entropy_loss: L_e averaged over levels; 0 for Euclidean look-up.
    level_mse: [levels] mean squared error of the latents after each level.
  """

  ids: list[jax.Array]
  latents: jax.Array
  vq_loss: jax.Array
  entropy_loss: jax.Array
  level_mse: jax.Array


class Linear(nnx.Module):
  """y = x W + b in full float32, PyTorch's default initialisation."""

  def __init__(self, cin: int, cout: int, rngs: nnx.Rngs):
    bound = 1 / math.sqrt(cin)
    self.kernel = nnx.Param(
      jax.random.uniform(rngs.params(), (cin, cout), minval=-bound, maxval=bound)
    )
    self.bias = nnx.Param(jax.random.uniform(rngs.params(), (cout,), minval=-bound, maxval=bound))

  def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b d"]:
    return jnp.matmul(x, self.kernel[...], precision="highest") + self.bias[...]

  def kernel_and_bias(self) -> Float[Array, "_ d"]:
    """The matrix M of y = [x, 1] M."""
    return jnp.concatenate([self.kernel[...], self.bias[...][None]])


class VectorNorm(nnx.Module):
  """RMSNorm or LayerNorm over the last axis, eps 1e-5."""

  def __init__(self, dim: int, kind: str):
    self.kind = kind
    self.scale = nnx.Param(jnp.ones(dim))
    if kind == "layer":
      self.bias = nnx.Param(jnp.zeros(dim))

  def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    x = self.centre(x)
    x = x * self.inverse_rms(x) * self.scale[...]
    return x + self.bias[...] if self.kind == "layer" else x

  def centre(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Takes the mean over the last axis away if this is a LayerNorm."""
    return x - x.mean(-1, keepdims=True) if self.kind == "layer" else x

  def inverse_rms(self, x: Float[Array, "*b c"]) -> Float[Array, "*b 1"]:
    """What centred vectors are multiplied by."""
    return jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


class ResidualQuantizer(nnx.Module):
  """Quantizes latents into token grids, coarse to fine; one codebook serves all levels.

  Parameters: `codebook` [V, code_dim]; with attention look-up also the projections `to_q`,
  `to_k`, `to_v` and the norms `norm_q`, `norm_k`.
  """

  def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs):
    self.config = config
    c, d = config.code_dim, config.attn_dim
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), (config.codebook_size, c)))
    if config.lookup == "attention":
      self.to_q, self.to_k, self.to_v = Linear(c, d, rngs), Linear(c, d, rngs), Linear(c, c, rngs)
      if config.norm != "none":
        self.norm_q, self.norm_k = VectorNorm(d, config.norm), VectorNorm(d, config.norm)

  def queries(self, x: Float[Array, "n c"]) -> Float[Array, "n _"]:
    """Queries of latent vectors, for `keys`."""
    q, kernel = self.to_q(x), self.to_k.kernel_and_bias()
    if self.config.norm != "none":
      q = self.norm_q(q) * self.norm_k.scale[...]
      kernel = self.norm_k.centre(kernel)
    return jnp.matmul(q, kernel.T, precision="highest")

  def keys(self) -> Float[Array, "v _"]:
    """Keys of all codes.

    A key of the paper, norm(c W + b), is [c, 1] [W; b] times a number. The product with [W; b] is
    the queries' part here, which makes the look-up half as wide and q·k the same (a LayerNorm's
    bias would add the same number for all codes, which no look-up sees).
    """
    codes = self.codebook[...]
    keys = jnp.pad(codes, ((0, 0), (0, 1)), constant_values=1)
    if self.config.norm == "none":
      return keys
    return keys * self.norm_k.inverse_rms(self.norm_k.centre(self.to_k(codes)))

  def values(self) -> Float[Array, "v c"]:
    """What each code stands for in latent space."""
    codes = self.codebook[...]
    return self.to_v(codes) if self.config.lookup == "attention" else codes

  def _levels(self, latents, quantize, codes):
    """Runs the residual chain; `quantize(x [N, C], *codes) -> (ids, values, codes, *losses)`."""
    b, h, w, c = latents.shape
    residual, total = latents, jnp.zeros_like(latents)
    for size in self.config.level_sizes(h, w):
      pooled = area_resize(residual, size).reshape(-1, c)
      ids, values, codes, *losses = quantize(pooled, *codes)
      values = bicubic_resize(values.reshape(b, *size, c), (h, w))
      total, residual = total + values, residual - values
      yield ids.reshape(b, *size), total, residual, losses

  def __call__(self, latents: Float[Array, "b h w c"]) -> QuantizerOutput:
    """Quantizes scaled latents and gives the losses; for training."""
    latents = latents.astype(jnp.float32)
    if self.config.lookup == "attention":
      levels = self._levels(latents, self._attend, (self.keys(), self.values()))
    else:
      levels = self._levels(latents, self._nearest, (self.values(),))
    ids, totals, residuals, losses = zip(*levels, strict=True)
    vq_loss, entropy_loss = jnp.mean(jnp.array(losses), axis=0)
    level_mse = jax.lax.stop_gradient(jnp.array([jnp.square(r).mean() for r in residuals]))
    return QuantizerOutput(list(ids), totals[-1], vq_loss, entropy_loss, level_mse)

  def _attend(self, x, keys, values):
    found = lookup.attention_lookup(
      self.queries(x),
      keys,
      values,
      scale=self.config.attn_dim**-0.5,
      temperature=self.config.entropy_temperature,
      chunk_size=self.config.chunk_size,
    )
    sg = jax.lax.stop_gradient
    beta = 0.05 if self.config.beta is None else self.config.beta
    loss = (
      jnp.square(found.z - x).mean()
      + jnp.square(sg(found.z_hard) - x).mean()
      + beta * jnp.square(found.z_hard - sg(x)).mean()
    )
    return found.ids, found.z, (found.k, found.v), loss, found.entropy_loss

  def _nearest(self, x, codes):
    sg = jax.lax.stop_gradient
    ids = lookup.euclidean_lookup(sg(x), sg(codes), chunk_size=self.config.chunk_size)
    chosen = codes[ids]
    beta = 0.25 if self.config.beta is None else self.config.beta
    loss = jnp.square(sg(x) - chosen).mean() + beta * jnp.square(x - sg(chosen)).mean()
    return ids, x + sg(chosen - x), (codes,), loss, jnp.zeros(())

  def encode(self, latents: Float[Array, "b h w c"]) -> list[Int[Array, "b p q"]]:
    """Ids of scaled latents, one array per level, coarse to fine."""
    keys = self.keys() if self.config.lookup == "attention" else None
    values = self.values()
    chunk = self.config.chunk_size

    def quantize(x, values):
      if keys is None:
        ids = lookup.euclidean_lookup(x, values, chunk_size=chunk)
      else:
        ids = lookup.attention_ids(self.queries(x), keys, chunk_size=chunk)
      return ids, values[ids], (values,)

    latents = latents.astype(jnp.float32)
    return [ids for ids, *_ in self._levels(latents, quantize, (values,))]

  def decode(
    self, ids: list[Int[Array, "b _ _"]], size: tuple[int, int] | None = None
  ) -> Float[Array, "b h w c"]:
    """Scaled latents of the given levels, which may be the first few only.

    Args:
      ids: int32 [B, ph, pw] per level, coarse to fine.
      size: latent height and width; the training size unless given or, with all levels, seen.

    Raises:
      UserError: no levels, too many, or grids that do not belong to `size`.
    """
    levels, last = len(self.config.patch_sizes), self.config.patch_sizes[-1]
    if not 1 <= len(ids) <= levels:
      raise UserError(f"{len(ids)} levels of ids given; the tokenizer has {levels}")
    if size is None:
      size = tuple(ids[-1].shape[1:]) if len(ids) == levels else (last, last)
    expected = self.config.level_sizes(*size)
    shapes = [tuple(i.shape[1:]) for i in ids]
    if shapes != expected[: len(ids)]:
      raise UserError(
        f"ids of grids {shapes} do not fit latents of {size[0]}x{size[1]}, which need "
        f"{expected[: len(ids)]}; give size= for other than the training size"
      )
    values = self.values()
    return sum(bicubic_resize(values[i], size) for i in ids)
