"""What all look-ups share: their config, what they find, and what they must do."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from coda_jax.errors import UserError
from coda_jax.models.token_grids import TokenGrids

GRADIENTS = ("straight_through", "rotation")


@dataclasses.dataclass(frozen=True)
class QuantizerConfig(TokenGrids):
  """Shape of the quantizer.

  Attributes:
    codebook_size: number of codes V.
    patch_sizes: side of each level's token grid, coarse to fine; the last is the latent's side.
    code_dim: channels of latents and codes.
    lookup: "attention" (paper, Eq. 6 to 8), "euclidean" (plain VQ; residual VQ with more levels),
      "product" (VQ of parts of a vector), "ibq" (attention without projections), "fsq", "lfq" or
      "bsq" (`scalar_lookups`).
    attn_dim: width of queries and keys.
    norm: of queries and keys: "rms", "layer" or "none".
    beta: weight of the loss that pulls codes to latents (attention, ibq) or latents to codes
      (euclidean, product, lfq, bsq); None is the look-up's `default_beta`. FSQ has no such loss.
    entropy_temperature: tau of the entropy loss.
    chunk_size: tokens at a time in the streamed look-up; None leaves it to the look-up.
    fsq_levels: levels of each number of FSQ, V in product; () are the paper's for this V.
    gradient: how the gradient passes from values to vectors: "straight_through", or "rotation"
      (euclidean, product).
    product_heads: parts of a vector that the product look-up quantizes apart; V is a number to
      this power.
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
  fsq_levels: tuple[int, ...] = ()
  gradient: str = "straight_through"
  product_heads: int = 2

  def __post_init__(self):
    for name in ("codebook_size", "code_dim", "attn_dim", "product_heads"):
      if getattr(self, name) < 1:
        raise UserError(f"quantizer.{name} is {getattr(self, name)}; it must be at least 1")
    if not self.entropy_temperature > 0:
      temperature = self.entropy_temperature
      raise UserError(f"quantizer.entropy_temperature is {temperature}; it must be above 0")
    if not self.patch_sizes or min(self.patch_sizes) < 1:
      raise UserError(f"quantizer.patch_sizes is {self.patch_sizes}; give sides of at least 1")
    if self.chunk_size is not None and self.chunk_size < 1:
      raise UserError(f"quantizer.chunk_size is {self.chunk_size}; it must be at least 1")
    self.lookup_class.check(self)

  @property
  def lookup_class(self) -> "type[Lookup]":
    """The look-up's class; its attributes tell other parts of the program what they need."""
    from coda_jax.models.lookups import LOOKUPS  # its classes derive from those here

    if self.lookup not in LOOKUPS:
      raise UserError(f"quantizer.lookup is {self.lookup!r}; it is one of {', '.join(LOOKUPS)}")
    return LOOKUPS[self.lookup]

  def level_sizes(self, h: int, w: int) -> list[tuple[int, int]]:
    """Token grid of every level for latents of h x w.

    Level l has round(p_l * h / h0) x round(p_l * w / w0) tokens, at least 1; the last is h x w.
    """
    last = self.patch_sizes[-1]

    def side(p, n):  # rounds halves up, in integers
      return n if p == last else max(1, (2 * p * n + last) // (2 * last))

    sizes = [(side(p, h), side(p, w)) for p in self.patch_sizes]
    return [*sizes[:-1], (h, w)]


class Found(NamedTuple):
  """Codes of n vectors.

  `codes` is what the look-up was given. A further look-up that takes these codes instead adds its
  gradients to the same arrays; otherwise the gradients of every level are held and summed at the
  end.
  """

  ids: Int[Array, "n"]
  values: Float[Array, "n c"]  # in training with straight-through gradients
  codes: Any
  vq_loss: Float[Array, ""] | float = 0.0
  entropy_loss: Float[Array, ""] | float = 0.0


class Lookup(nnx.Module):
  """Base of the look-ups. It has no parameters.

  Attributes:
    in_official_code: whether the official PyTorch code has this look-up.
    codes_start_as_latents: whether codes of a new quantizer are latents of the first batch.
    default_beta: what `QuantizerConfig.beta` is if it is None.
    gradients: those of `GRADIENTS` that it has.
    confidence_label: what the size of `confidence` is.
  """

  confidence_label = "distance"
  in_official_code = False
  codes_start_as_latents = False
  default_beta: float
  gradients: tuple[str, ...] = GRADIENTS[:1]

  def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs):
    del rngs
    self.config = config

  @classmethod
  def check(cls, config: QuantizerConfig) -> None:
    """Raises UserError if the config does not suit the look-up."""
    if config.gradient not in cls.gradients:
      raise UserError(
        f"quantizer.gradient is {config.gradient!r}; for the {config.lookup} look-up it is "
        + " or ".join(cls.gradients)
      )

  @property
  def beta(self) -> float:
    """The commitment weight: the config's, or the look-up's own."""
    return self.default_beta if self.config.beta is None else self.config.beta

  def values(self) -> Float[Array, "v c"]:
    """The code values, in latent space."""
    raise NotImplementedError

  def confidence(self, x: Float[Array | np.ndarray, "n c"]) -> Float[Array, "n v"]:
    """How likely each code is for a few vectors; largest for the one that `ids` finds.

    For pictures: it holds vectors x codes. By default minus the distance to the code's value.
    """
    return -jnp.linalg.norm(x[:, None] - self.values(), axis=-1)

  def codes(self) -> Any:
    """Arrays of the codes that `ids` and `look_up` take; computed once for all levels."""
    raise NotImplementedError

  def ids(self, x: Float[Array, "n c"], codes: Any) -> Int[Array, "n"]:
    """Ids of vectors."""
    raise NotImplementedError

  def look_up(self, x: Float[Array, "n c"], codes: Any) -> Found:
    """Ids, straight-through values and losses of vectors, for training."""
    raise NotImplementedError


class CodebookLookup(Lookup):
  """Base of the look-ups with codes that are learned. Parameter: `codebook` [rows, code_dim]."""

  def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    shape = self.rows(config), config.code_dim
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), shape))

  @classmethod
  def rows(cls, config: QuantizerConfig) -> int:
    """Rows of the codebook; V unless codes are made of parts of several."""
    return config.codebook_size
