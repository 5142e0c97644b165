"""A quantizer that needs no training: blocks of latents, a linear transform, a code a direction.

Blocks of b x b latents become vectors, and an affine map turns these into coordinates in which the
squared error is what the decoder makes of it. A token holds the codes of a few coordinates: scalar
levels each, or one vector. `discretize` finds all of it from data; see docs/equal_bits.md.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from coda_jax.errors import UserError
from coda_jax.models.inputs import check_latents
from coda_jax.models.lookup_base import GRADIENTS
from coda_jax.models.lookups import EuclideanLookup, rotated
from coda_jax.models.quantizer import QuantizerOutput
from coda_jax.models.token_factors import factors_by_level
from coda_jax.models.token_grids import TokenGrids
from coda_jax.ops.codebook_lookup import euclidean_lookup

Blocks = Array | np.ndarray
METHODS = ("vq", "lloyd-max", "gaussian", "token-bridge")


class Factor(NamedTuple):
  """One of the codes that a token is the product of: its number of all, and its coordinates."""

  number: int
  coordinates: slice
  codes: int


@dataclasses.dataclass(frozen=True)
class TransformConfig(TokenGrids):
  """Shape of a transform quantizer.

  Every level has ids of its own: those of level l follow those of level l - 1.

  Attributes:
    codebook_size: number of ids V: the sum of `level_codes`.
    patch_sizes: side of each level's token grid, all the same: the latent's side / `block`.
    code_dim: width of a block: channels of a latent x block².
    level_codes: codes of each level, the product of those of its factors.
    factor_codes, factor_dims: codes and coordinates of each factor, those of level 1 first.
    block: side of a block of latents.
    lookup: how the codes were found, one of `METHODS`.
    beta: in training, weight of the loss that pulls latents to codes; None is 0.25.
    gradient: in training, as of `QuantizerConfig`, of blocks.
  """

  codebook_size: int
  patch_sizes: tuple[int, ...]
  code_dim: int
  level_codes: tuple[int, ...]
  factor_codes: tuple[int, ...]
  factor_dims: tuple[int, ...]
  block: int = 1
  lookup: str = "lloyd-max"
  beta: float | None = None
  gradient: str = GRADIENTS[0]

  def __post_init__(self):
    if self.lookup not in METHODS:
      raise UserError(f"quantizer.lookup is {self.lookup!r}; it is one of {', '.join(METHODS)}")
    if self.gradient not in GRADIENTS:
      raise UserError(f"quantizer.gradient is {self.gradient!r}; it is {' or '.join(GRADIENTS)}")
    fits = (
      len(self.patch_sizes) == len(self.level_codes) > 0
      and len(set(self.patch_sizes)) == 1
      and self.block >= 1
      and self.code_dim % self.block**2 == 0
      and self.codebook_size == sum(self.level_codes)
      and len(self.factor_codes) == len(self.factor_dims)
      and min(self.factor_codes, default=0) >= 2
      and math.prod(self.factor_codes) == math.prod(self.level_codes)
      and sum(self.factor_dims) <= self.code_dim
      and [math.prod(f.codes for f in x) for x in self.levels] == list(self.level_codes)
    )
    if not fits:
      raise UserError("quantizer: sizes of levels, factors and blocks do not fit each other")

  @property
  def lookup_class(self) -> "type[TransformQuantizer]":
    """As of `QuantizerConfig`: what other parts of the program ask about."""
    return TransformQuantizer

  @property
  def levels(self) -> list[list[Factor]]:
    """The factors of each level."""
    ends = list(itertools.accumulate(self.factor_dims))
    slices = map(slice, [0, *ends], ends)
    numbers = itertools.count()
    return [
      [Factor(next(numbers), next(slices), codes) for codes in level]
      for level in factors_by_level(self.level_codes, self.factor_codes)
    ]

  @property
  def codes_by_level(self) -> tuple[int, ...]:
    """How many ids each level's tokens choose from."""
    return self.level_codes

  @property
  def ranges(self) -> list[tuple[int, int]]:
    """The first id of each level and the one behind its last."""
    ends = list(itertools.accumulate(self.level_codes))
    return [(end - n, end) for end, n in zip(ends, self.level_codes, strict=True)]

  @property
  def channels(self) -> int:
    """Channels of the latents."""
    return self.code_dim // self.block**2

  @property
  def latent_side(self) -> int:
    """Side of the latents of an image of the training size."""
    return self.patch_sizes[-1] * self.block

  def latent_size(self, grids: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """As of `TokenGrids`; every level's grid tells."""
    h, w = grids[-1]
    return h * self.block, w * self.block

  def level_sizes(self, h: int, w: int) -> list[tuple[int, int]]:
    """Token grid of every level for latents of h x w. Raises UserError if blocks do not fit."""
    b = self.block
    if h % b or w % b:
      raise UserError(f"latents of {h}x{w} cannot be cut into the tokenizer's blocks of {b}x{b}")
    return [(h // b, w // b)] * len(self.level_codes)


class TransformQuantizer(nnx.Module):
  """Quantizes blocks of latents; see the module.

  Parameters: `mean` [D] and `analysis` [D, n] make coordinates of a block's D numbers, `synthesis`
  [n, D] brings quantized ones back; `codebooks` [codes, coordinates] of each factor.
  """

  in_official_code = False
  codes_start_as_latents = False
  confidence_label = "distance"

  def __init__(self, config: TransformConfig, *, rngs: nnx.Rngs | None = None):
    del rngs  # all is found from data; until then it is zero
    self.config = config
    d, n = config.code_dim, sum(config.factor_dims)
    self.mean = nnx.Param(jnp.zeros(d))
    self.analysis, self.synthesis = nnx.Param(jnp.zeros((d, n))), nnx.Param(jnp.zeros((n, d)))
    shapes = zip(config.factor_codes, config.factor_dims, strict=True)
    self.codebooks = nnx.List([nnx.Param(jnp.zeros(shape)) for shape in shapes])

  def __call__(self, latents: Float[Array, "b h w c"]) -> QuantizerOutput:
    """Quantizes scaled latents, with losses by which codes and latents may train: those of
    `EuclideanLookup`."""
    sg, (_, h, w, _) = jax.lax.stop_gradient, latents.shape
    ids = self.encode(latents)
    totals = jnp.cumsum(jnp.stack(self.level_latents(ids, (h, w))), 0)
    errors = jnp.square(totals - sg(latents)).mean((1, 2, 3, 4))
    beta = EuclideanLookup.default_beta if self.config.beta is None else self.config.beta
    return QuantizerOutput(
      ids=ids,
      latents=self._through(latents, sg(totals[-1])),
      vq_loss=errors[-1] + beta * jnp.square(latents - sg(totals[-1])).mean(),
      entropy_loss=jnp.zeros(()),
      level_mse=sg(errors),
    )

  def _through(
    self, latents: Float[Array, "b h w c"], values: Float[Array, "b h w c"]
  ) -> Float[Array, "b h w c"]:
    """Values that pass their gradient on to latents."""
    if self.config.gradient == "straight_through":
      return latents + jax.lax.stop_gradient(values - latents)
    b = self.config.block
    x, y = (jnp.asarray(to_blocks(z.astype(jnp.float32), b)) for z in (latents, values))
    turned = rotated(x.reshape(-1, x.shape[-1]), y.reshape(-1, x.shape[-1]))
    return jnp.asarray(from_blocks(turned.reshape(x.shape), b), latents.dtype)

  def encode(self, latents: Float[Array, "b h w c"]) -> list[Int[Array, "b p q"]]:
    """Ids of scaled latents, one array per level, coarse to fine."""
    config = self.config
    check_latents(latents, config.channels)
    config.level_sizes(*latents.shape[1:3])
    blocks = to_blocks(latents.astype(jnp.float32), config.block)
    x = jnp.matmul(blocks - self.mean[...], self.analysis[...], precision="highest")
    out = []
    for (first, _), level in zip(config.ranges, config.levels, strict=True):
      ids = jnp.zeros(x.shape[:3], jnp.int32)
      for factor in level:
        ids = ids * factor.codes + self._nearest(x[..., factor.coordinates], factor)
      out.append(first + ids)
    return out

  def decode(
    self, ids: list[Int[Array, "b _ _"]], size: tuple[int, int] | None = None
  ) -> Float[Array, "b h w c"]:
    """Scaled latents of the given levels, which may be the first few only.

    Args:
      ids: int32 [B, ph, pw] per level, coarse to fine.
      size: latent height and width; by default what the grids are of.

    Raises:
      UserError: no levels, too many, ids of other levels, or grids that do not belong to `size`.
    """
    size = self.config.check(ids, size)
    return functools.reduce(jnp.add, self.level_latents(ids, size))

  def level_latents(
    self, ids: list[Int[Array, "b _ _"]], size: tuple[int, int]
  ) -> list[Float[Array, "b h w c"]]:
    """What each of the first levels adds to the latents; ids of no code of its level add 0."""
    del size  # the grids have one
    out, synthesis = [], self.synthesis[...]
    for grid, (start, stop), level in zip(
      ids, self.config.ranges, self.config.levels, strict=False
    ):
      values = self._coordinates(jnp.clip(grid - start, 0, stop - start - 1), level)
      values = jnp.where(((grid >= start) & (grid < stop))[..., None], values, 0)
      rows = synthesis[level[0].coordinates.start : level[-1].coordinates.stop]
      blocks = jnp.matmul(values, rows, precision="highest")
      blocks += 0 if out else self.mean[...]
      out.append(from_blocks(blocks, self.config.block))
    return out

  def values(self) -> Float[Array, "v d"]:
    """What every code adds to a block of latents, as `vectors` writes blocks."""
    return jnp.concatenate([self._level_values(i) for i in range(len(self.config.levels))])

  def values_of(self, ids: Int[Blocks, "n"]) -> Float[Array, "n d"]:
    """`values` of some codes; there may be too many for all of them."""
    out = jnp.zeros((len(ids), self.config.code_dim))
    for level, (start, stop) in enumerate(self.config.ranges):
      inside = (ids >= start) & (ids < stop)
      values = self._level_values(level, jnp.clip(ids - start, 0, stop - start - 1))
      out = jnp.where(inside[:, None], values, out)
    return out

  def embedding_values(self) -> Float[Array, "v d"]:
    """`values` with a mean square of 1 in each level; those of fine levels are small otherwise."""
    parts = [self._level_values(i) for i in range(len(self.config.levels))]
    scaled = [x * jax.lax.rsqrt(jnp.square(x).mean() + 1e-12) for x in parts]
    return jnp.concatenate(scaled)

  def confidence(self, x: Float[Blocks, "n d"]) -> Float[Array, "n v"]:
    """Minus the distance of a few vectors to the v codes of the last level."""
    values = self._level_values(len(self.config.levels) - 1)
    return jax.lax.map(lambda row: -jnp.linalg.norm(row - values, axis=-1), jnp.asarray(x))

  def vectors(self, latents: Float[Blocks, "*b h w c"]) -> Float[Blocks, "*b p q d"]:
    """Latents as the vectors that the codes are for: blocks."""
    return to_blocks(latents, self.config.block)

  def _nearest(self, x: Float[Array, "*b m"], factor: Factor) -> Int[Array, "*b"]:
    codes = self.codebooks[factor.number][...]
    if codes.shape[1] == 1:  # few levels
      return jnp.argmin(jnp.abs(x - codes[:, 0]), -1).astype(jnp.int32)
    return euclidean_lookup(x.reshape(-1, x.shape[-1]), codes).reshape(x.shape[:-1])

  def _level_values(self, level: int, ids: Int[Array, "n"] | None = None) -> Float[Array, "n d"]:
    """What codes of a level, by default all, add to a block; ids count within the level."""
    factors = self.config.levels[level]
    rows = self.synthesis[factors[0].coordinates.start : factors[-1].coordinates.stop]
    ids = jnp.arange(self.config.level_codes[level]) if ids is None else ids
    return self._coordinates(ids, factors) @ rows

  def _coordinates(self, digits: Int[Array, "*b"], level: list[Factor]) -> Float[Array, "*b m"]:
    """Coordinates of ids that are counted within their level."""
    parts = []
    for factor in reversed(level):
      parts.append(self.codebooks[factor.number][...][digits % factor.codes])
      digits = digits // factor.codes
    return jnp.concatenate(parts[::-1], -1)


def to_blocks(x: Float[Blocks, "*b h w c"], side: int) -> Float[Blocks, "*b p q d"]:
  """Blocks of side x side latents as vectors, row by row."""
  *b, h, w, c = x.shape
  x = x.reshape(*b, h // side, side, w // side, side, c).swapaxes(-4, -3)
  return x.reshape(*b, h // side, w // side, side * side * c)


def from_blocks(x: Float[Blocks, "*b p q d"], side: int) -> Float[Blocks, "*b h w c"]:
  """Inverse of `to_blocks`."""
  *b, p, q, d = x.shape
  x = x.reshape(*b, p, q, side, side, d // side**2).swapaxes(-4, -3)
  return x.reshape(*b, p * side, q * side, d // side**2)
