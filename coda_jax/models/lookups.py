"""Look-ups: a codebook, and how vectors find their codes in it.

A further look-up is a class that derives from `Lookup` and a line in `LOOKUPS`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from coda_jax.errors import UserError
from coda_jax.models.lookup_base import (
  GRADIENTS,
  CodebookLookup,
  Found,
  Lookup,
  QuantizerConfig,
)
from coda_jax.models.scalar_lookups import BinarySphericalLookup, FiniteScalarLookup, LookupFree
from coda_jax.ops import codebook_lookup

_SMALL = 1e-6  # the length of a vector without direction


class EuclideanLookup(CodebookLookup):
  """The nearest code (plain VQ; van den Oord et al. 2017).

  The value is x + sg(c − x), or with `gradient="rotation"` that of `rotated`. The codes learn from
  the loss alone: mean((sg x − c)²) + beta·mean((x − sg c)²).
  """

  codes_start_as_latents = True
  default_beta = 0.25
  gradients = GRADIENTS

  def values(self) -> Float[Array, "v c"]:
    return self.codebook[...]

  def codes(self) -> Float[Array, "r c"]:
    return self.codebook[...]

  def ids(self, x: Float[Array, "n c"], codes: Float[Array, "r c"]) -> Int[Array, "n"]:
    return codebook_lookup.euclidean_lookup(x, codes, chunk_size=self.config.chunk_size)

  def look_up(self, x: Float[Array, "n c"], codes: Float[Array, "r c"]) -> Found:
    sg = jax.lax.stop_gradient
    ids = self.ids(x, codes)
    chosen = self.chosen(codes, ids)
    loss = jnp.square(sg(x) - chosen).mean() + self.beta * jnp.square(x - sg(chosen)).mean()
    values = rotated(x, chosen) if self.config.gradient == "rotation" else x + sg(chosen - x)
    return Found(ids, values, codes, loss)

  def chosen(self, codes: Float[Array, "r c"], ids: Int[Array, "n"]) -> Float[Array, "n c"]:
    """The codes of ids."""
    return codebook_lookup.code_values(codes, ids)


class ProductLookup(EuclideanLookup):
  """The nearest code of each part of a vector (product quantization; Jégou et al. 2011).

  A vector's channels are split into `product_heads` parts, each with R codes of its own, which are
  the R rows of the codebook: V = R^heads. An id is the parts' ids in base R, the first part's the
  lowest. Losses and gradients are those of the Euclidean look-up.
  """

  @classmethod
  def check(cls, config: QuantizerConfig) -> None:
    super().check(config)
    heads, size = config.product_heads, config.codebook_size
    if config.code_dim % heads:
      raise UserError(
        f"quantizer.product_heads is {heads}; it must divide the {config.code_dim} channels"
      )
    if cls.rows(config) ** heads != size:
      raise UserError(
        f"quantizer.codebook_size is {size}; for the product look-up with product_heads={heads} it "
        f"is a number to the power of {heads}, such as {cls.rows(config) ** heads}"
      )

  @classmethod
  def rows(cls, config: QuantizerConfig) -> int:
    return round(config.codebook_size ** (1 / config.product_heads))

  def values(self) -> Float[Array, "v c"]:
    return self.chosen(self.codebook[...], jnp.arange(self.config.codebook_size))

  def ids(self, x: Float[Array, "n c"], codes: Float[Array, "r c"]) -> Int[Array, "n"]:
    parts = zip(*(jnp.split(y, self.config.product_heads, 1) for y in (x, codes)), strict=True)
    return sum(
      (
        codebook_lookup.euclidean_lookup(*part, chunk_size=self.config.chunk_size) * len(codes) ** h
        for h, part in enumerate(parts)
      ),
      jnp.zeros(len(x), jnp.int32),
    )

  def chosen(self, codes: Float[Array, "r c"], ids: Int[Array, "n"]) -> Float[Array, "n c"]:
    rows = len(codes)
    parts = enumerate(jnp.split(codes, self.config.product_heads, 1))
    found = [codebook_lookup.code_values(part, ids // rows**h % rows) for h, part in parts]
    return jnp.concatenate(found, 1)


def rotated(x: Float[Array, "n c"], values: Float[Array, "n c"]) -> Float[Array, "n c"]:
  """`values` with the gradient of the rotation trick (Fifty et al., arXiv 2410.06424).

  The value is sg(|v|/|x| R) x, with the rotation R of x's direction to that of v in their plane:
  R = I − 2 r rᵀ + 2 v̂ x̂ᵀ, r the direction of x̂ + v̂. A vector or a value of length 0 has no
  direction: there the gradient passes straight through. None reaches `values`.
  """
  sg = jax.lax.stop_gradient
  size, size_value = (jnp.linalg.norm(y, axis=1, keepdims=True) for y in (sg(x), sg(values)))
  known = (size > _SMALL) & (size_value > _SMALL)
  start, end = sg(x) / jnp.maximum(size, _SMALL), sg(values) / jnp.maximum(size_value, _SMALL)
  middle = start + end
  middle /= jnp.maximum(jnp.linalg.norm(middle, axis=1, keepdims=True), _SMALL)

  def product(a, b):
    return (a * b).sum(1, keepdims=True)

  turned = x - 2 * middle * product(x, middle) + 2 * end * product(x, start)
  turned = jnp.where(known, size_value / jnp.maximum(size, _SMALL) * turned, x)
  return turned + sg(values - turned)  # the values to the last digit


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


class AttentionLookup(CodebookLookup):
  """The code with the largest attention weight (CODA, Eq. 6 to 8).

  Parameters besides the codebook: the projections `to_q`, `to_k`, `to_v`, and the norms `norm_q`,
  `norm_k` unless the config has none.
  """

  confidence_label = "attention weight"
  in_official_code = True
  default_beta = 0.05

  @classmethod
  def check(cls, config: QuantizerConfig) -> None:
    super().check(config)
    if config.norm not in NORMS:
      raise UserError(f"quantizer.norm is {config.norm!r}; it is one of {', '.join(NORMS)}")

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
    scale = self.config.attn_dim**-0.5
    return _attention(x, self.queries(x), codes, scale, self.beta, self.config)


class IndexBackpropagationLookup(CodebookLookup):
  """IBQ, index backpropagation quantization (Shi et al., arXiv 2412.02692, section 3.2).

  The code with the largest product with the vector. The gradient passes through the softmax of all
  products, so that it reaches every code. Losses as of the attention look-up, which is this one
  with projections and norms.
  """

  confidence_label = "probability"
  default_beta = 0.25

  def values(self) -> Float[Array, "v c"]:
    return self.codebook[...]

  def confidence(self, x: Float[Array | np.ndarray, "n c"]) -> Float[Array, "n v"]:
    return jax.nn.softmax(jnp.matmul(jnp.asarray(x), self.values().T, precision="highest"))

  def codes(self) -> ProjectedCodes:
    return ProjectedCodes(self.values(), self.values())

  def ids(self, x: Float[Array, "n c"], codes: ProjectedCodes) -> Int[Array, "n"]:
    return codebook_lookup.attention_ids(x, codes.keys, chunk_size=self.config.chunk_size)

  def look_up(self, x: Float[Array, "n c"], codes: ProjectedCodes) -> Found:
    return _attention(x, x, codes, 1.0, self.beta, self.config)


def _attention(
  x: Float[Array, "n c"],
  queries: Float[Array, "n _"],
  codes: ProjectedCodes,
  scale: float,
  beta: float,
  config: QuantizerConfig,
) -> Found:
  """Codes of the largest q·k, with the gradient of softmax(scale·q·k), and the losses."""
  found = codebook_lookup.attention_lookup(
    queries,
    codes.keys,
    codes.values,
    scale=scale,
    temperature=config.entropy_temperature,
    chunk_size=config.chunk_size,
  )
  sg = jax.lax.stop_gradient
  loss = (
    jnp.square(found.z - x).mean()
    + jnp.square(sg(found.z_hard) - x).mean()
    + beta * jnp.square(found.z_hard - sg(x)).mean()
  )
  return Found(found.ids, found.z, ProjectedCodes(found.k, found.v), loss, found.entropy_loss)


LOOKUPS: dict[str, type[Lookup]] = {
  "attention": AttentionLookup,
  "euclidean": EuclideanLookup,
  "product": ProductLookup,
  "ibq": IndexBackpropagationLookup,
  "fsq": FiniteScalarLookup,
  "lfq": LookupFree,
  "bsq": BinarySphericalLookup,
}
