"""Look-ups: a codebook, and how vectors find their codes in it.

A further look-up is a class that derives from `Lookup` and a line in `LOOKUPS`.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from coda_jax.errors import UserError
from coda_jax.models.token_grids import TokenGrids
from coda_jax.ops import codebook_lookup


@dataclasses.dataclass(frozen=True)
class QuantizerConfig(TokenGrids):
  """Shape of the quantizer.

  Attributes:
    codebook_size: number of codes V.
    patch_sizes: side of each level's token grid, coarse to fine; the last is the latent's side.
    code_dim: channels of latents and codes.
    lookup: "attention" (paper, Eq. 6 to 8) or "euclidean" (plain VQ; residual VQ with more levels).
    attn_dim: width of queries and keys.
    norm: of queries and keys: "rms", "layer" or "none".
    beta: weight of the loss that pulls codes to latents (attention) or latents to codes
      (euclidean); None is the look-up's `default_beta`, 0.05 or 0.25.
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
    for name in ("codebook_size", "code_dim", "attn_dim"):
      if getattr(self, name) < 1:
        raise UserError(f"quantizer.{name} is {getattr(self, name)}; it must be at least 1")
    if not self.entropy_temperature > 0:
      temperature = self.entropy_temperature
      raise UserError(f"quantizer.entropy_temperature is {temperature}; it must be above 0")
    if self.lookup not in LOOKUPS:
      raise UserError(f"quantizer.lookup is {self.lookup!r}; it is one of {', '.join(LOOKUPS)}")
    if self.norm not in NORMS:
      raise UserError(f"quantizer.norm is {self.norm!r}; it is one of {', '.join(NORMS)}")
    if not self.patch_sizes or min(self.patch_sizes) < 1:
      raise UserError(f"quantizer.patch_sizes is {self.patch_sizes}; give sides of at least 1")
    if self.chunk_size is not None and self.chunk_size < 1:
      raise UserError(f"quantizer.chunk_size is {self.chunk_size}; it must be at least 1")

  @property
  def lookup_class(self) -> "type[Lookup]":
    """The look-up's class; its attributes tell other parts of the program what they need."""
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
  """Base of the look-ups.

  Parameter: `codebook` [V, code_dim].

  Attributes:
    in_official_code: whether the official PyTorch code has this look-up.
    codes_start_as_latents: whether codes of a new quantizer are latents of the first batch.
    default_beta: what `QuantizerConfig.beta` is if it is None.
    confidence_label: what the size of `confidence` is.
  """

  confidence_label = "distance"
  in_official_code = False
  codes_start_as_latents = False
  default_beta: float

  def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs):
    self.config = config
    shape = config.codebook_size, config.code_dim
    self.codebook = nnx.Param(jax.random.normal(rngs.params(), shape))

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


class EuclideanLookup(Lookup):
  """The nearest code (plain VQ; van den Oord et al. 2017).

  The value is x + sg(c − x). The codes learn from the loss alone:
  mean((sg x − c)²) + beta·mean((x − sg c)²).
  """

  codes_start_as_latents = True
  default_beta = 0.25

  def values(self) -> Float[Array, "v c"]:
    return self.codebook[...]

  def codes(self) -> Float[Array, "v c"]:
    return self.codebook[...]

  def ids(self, x: Float[Array, "n c"], codes: Float[Array, "v c"]) -> Int[Array, "n"]:
    return codebook_lookup.euclidean_lookup(x, codes, chunk_size=self.config.chunk_size)

  def look_up(self, x: Float[Array, "n c"], codes: Float[Array, "v c"]) -> Found:
    sg = jax.lax.stop_gradient
    ids = self.ids(x, codes)
    chosen = codebook_lookup.code_values(codes, ids)
    loss = jnp.square(sg(x) - chosen).mean() + self.beta * jnp.square(x - sg(chosen)).mean()
    return Found(ids, x + sg(chosen - x), codes, loss)


class ProjectedCodes(NamedTuple):
  """Codes of the attention look-up."""

  keys: Float[Array, "v _"]
  values: Float[Array, "v c"]


# Norms of queries and keys. Flax's fast variance, E[x²] − E[x]², would lose digits.
NORMS = {
  "rms": nnx.RMSNorm,
  "layer": functools.partial(nnx.LayerNorm, use_fast_variance=False),
  "none": None,
}


def _linear(cin: int, cout: int, rngs: nnx.Rngs) -> nnx.Linear:
  """y = x W + b in full float32, PyTorch's default initialisation."""
  bound = 1 / math.sqrt(cin)

  def init(key, shape, dtype):
    return jax.random.uniform(key, shape, dtype, minval=-bound, maxval=bound)

  return nnx.Linear(cin, cout, precision="highest", kernel_init=init, bias_init=init, rngs=rngs)


class AttentionLookup(Lookup):
  """The code with the largest attention weight (CODA, Eq. 6 to 8).

  Parameters besides the codebook: the projections `to_q`, `to_k`, `to_v`, and the norms `norm_q`,
  `norm_k` unless the config has none.
  """

  confidence_label = "attention weight"
  in_official_code = True
  default_beta = 0.05

  def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    c, d = config.code_dim, config.attn_dim
    self.to_q, self.to_k = _linear(c, d, rngs), _linear(c, d, rngs)
    self.to_v = _linear(c, c, rngs)
    if norm := NORMS[config.norm]:
      self.norm_q, self.norm_k = (norm(d, epsilon=1e-5, rngs=rngs) for _ in range(2))

  def queries(self, x: Float[Array, "n c"]) -> Float[Array, "n _"]:
    """Queries of vectors, for `keys`."""
    q, bias = self.to_q(x), self.to_k.bias
    assert bias is not None
    kernel = jnp.concatenate([self.to_k.kernel[...], bias[...][None]])
    if self.config.norm != "none":
      q = self.norm_q(q) * self.norm_k.scale[...]
      kernel = self._centred(kernel)
    return jnp.matmul(q, kernel.T, precision="highest")

  def keys(self) -> Float[Array, "v _"]:
    """Keys of all codes.

    A key of the paper, norm(c W + b), is [c, 1] [W; b] times a number. Here the queries take the
    product with [W; b]: q·k is the same, and the look-up half as wide. A LayerNorm's bias would add
    one number to the logits of all codes, which changes no look-up.
    """
    codes = self.codebook[...]
    keys = jnp.pad(codes, ((0, 0), (0, 1)), constant_values=1)
    if self.config.norm == "none":
      return keys
    squares = jnp.square(self._centred(self.to_k(codes)))
    return keys * jax.lax.rsqrt(squares.mean(-1, keepdims=True) + 1e-5)

  def _centred(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """x, or for a LayerNorm x minus its mean over the last axis."""
    return x - x.mean(-1, keepdims=True) if self.config.norm == "layer" else x

  def values(self) -> Float[Array, "v c"]:
    return self.to_v(self.codebook[...])

  def confidence(self, x: Float[Array | np.ndarray, "n c"]) -> Float[Array, "n v"]:
    logits = jnp.matmul(self.queries(jnp.asarray(x)), self.keys().T, precision="highest")
    return jax.nn.softmax(logits * self.config.attn_dim**-0.5)

  def codes(self) -> ProjectedCodes:
    return ProjectedCodes(self.keys(), self.values())

  def ids(self, x: Float[Array, "n c"], codes: ProjectedCodes) -> Int[Array, "n"]:
    chunk_size = self.config.chunk_size
    return codebook_lookup.attention_ids(self.queries(x), codes.keys, chunk_size=chunk_size)

  def look_up(self, x: Float[Array, "n c"], codes: ProjectedCodes) -> Found:
    found = codebook_lookup.attention_lookup(
      self.queries(x),
      codes.keys,
      codes.values,
      scale=self.config.attn_dim**-0.5,
      temperature=self.config.entropy_temperature,
      chunk_size=self.config.chunk_size,
    )
    sg = jax.lax.stop_gradient
    loss = (
      jnp.square(found.z - x).mean()
      + jnp.square(sg(found.z_hard) - x).mean()
      + self.beta * jnp.square(found.z_hard - sg(x)).mean()
    )
    return Found(found.ids, found.z, ProjectedCodes(found.k, found.v), loss, found.entropy_loss)


LOOKUPS: dict[str, type[Lookup]] = {"attention": AttentionLookup, "euclidean": EuclideanLookup}
