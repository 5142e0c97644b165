"""MaskGIT: a bidirectional transformer predicts masked tokens (Chang et al., arXiv 2202.04200).

The tokens of all levels stand in one sequence, coarse to fine, each grid row by row, behind the
condition. Blocks of the first half hand their output to those of the second (U-ViT, arXiv
2209.12152: concatenate, then a Linear).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from coda_jax.errors import UserError
from coda_jax.models.conditions import ClassCondition, TextCondition, TextShape
from coda_jax.models.token_factors import TokenFactors
from coda_jax.ops.attention import IMPLEMENTATIONS, attention

_EMBEDDINGS = ("codes", "table", "factors")
_normal = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class MaskGITConfig:
  """Shape of a MaskGIT.

  Attributes:
    width, depth, heads: of the transformer; `depth` blocks, an even number, and one in the middle.
    num_classes: classes; one more, the null class, stands for none. 0 for a model of texts.
    patch_sizes: side of each level's token grid, coarse to fine: the tokenizer's.
    codebook_size: codes V of the tokenizer.
    code_dim: channels of a code's value.
    embedding: "codes" makes embeddings and output table from the tokenizer's code values, "table"
      learns one table for both, "factors" one of the codes' factors (`models.token_factors`).
    mlp_ratio: inner width of a block's MLP / width.
    attention: "cudnn", "xla", "per_head" or None; see `ops.attention`.
    level_codes: codes of each level, if every level has its own, one after the other; () if all
      levels share codes.
    text: shape of a text's embedding, for a model of texts.
    factor_codes: for embedding "factors", codes of each factor of the tokens, level after level.
  """

  width: int
  depth: int
  heads: int
  num_classes: int
  patch_sizes: tuple[int, ...]
  codebook_size: int
  code_dim: int = 16
  embedding: str = "codes"
  mlp_ratio: float = 4.0
  attention: str | None = None
  level_codes: tuple[int, ...] = ()
  text: TextShape | None = None
  factor_codes: tuple[int, ...] = ()

  def __post_init__(self):
    if self.depth < 0 or self.depth % 2:
      raise UserError(f"model.depth is {self.depth}; it must be even: as many blocks in as out")
    if self.heads < 1 or self.width < 1 or self.width % self.heads:
      raise UserError(f"model.width={self.width} is not a multiple of model.heads={self.heads}")
    if self.embedding not in _EMBEDDINGS:
      known = ", ".join(_EMBEDDINGS)
      raise UserError(f"model.embedding is {self.embedding!r}; it is one of {known}")
    if self.embedding == "factors" and not self.factor_codes:
      raise UserError(
        "model.embedding is 'factors', but the tokens' codes have none; tokenizers of"
        " `coda_jax.discretize` have, but for --method coda"
      )
    if self.attention not in IMPLEMENTATIONS:
      raise UserError(f"model.attention is {self.attention!r}; it is one of {IMPLEMENTATIONS}")
    if self.num_classes < 0 or self.codebook_size < 1 or not self.patch_sizes:
      raise UserError("model: num_classes, codebook_size and patch_sizes must be those of tokens")
    if self.text and self.num_classes:
      raise UserError(f"model: {self.num_classes} classes and texts; a model has one of the two")

  @property
  def tokens(self) -> int:
    """Tokens N of an image."""
    return sum(p * p for p in self.patch_sizes)

  @property
  def levels(self) -> np.ndarray:
    """int32 [N], the level, from 0, of each position."""
    sizes = [p * p for p in self.patch_sizes]
    return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

  @functools.cached_property
  def factors(self) -> TokenFactors | None:
    """The layout of the tokens' factors, for embedding "factors"."""
    if self.embedding != "factors":
      return None
    return TokenFactors(self.patch_sizes, self.level_codes, self.factor_codes)

  @property
  def outputs(self) -> int:
    """Logits of a token: rows of the output table."""
    return self.codebook_size if self.factors is None else self.factors.rows

  @property
  def level_of_code(self) -> np.ndarray:
    """int32 [V], the level, from 0, of each code where levels have codes of their own."""
    return np.repeat(np.arange(len(self.level_codes), dtype=np.int32), self.level_codes)

  @property
  def mask_id(self) -> int:
    """The id of a masked token."""
    return self.codebook_size

  @property
  def null_class(self) -> int:
    """The class that stands for no class."""
    return self.num_classes


class Codes(nnx.Variable):
  """The tokenizer's code values [V, C]: saved with the model, never trained."""


def _linear(cin: int, cout: int, dtype: DTypeLike, rngs: nnx.Rngs, std: float = 0.02) -> nnx.Linear:
  """Computes in `dtype`; float32 weights, normal with a standard deviation of `std`."""
  init = nnx.initializers.normal(std)
  return nnx.Linear(cin, cout, dtype=dtype, kernel_init=init, rngs=rngs)


def _layer_norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
  """Float32, the result too: the Linear behind it casts to its own type."""
  return nnx.LayerNorm(width, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


class Block(nnx.Module):
  """Attention and MLP, each behind a norm; with `skip`, a Linear takes a long skip in first."""

  def __init__(
    self, config: MaskGITConfig, dtype: DTypeLike, rngs: nnx.Rngs, *, skip: bool = False
  ):
    width, inner = config.width, round(config.mlp_ratio * config.width)
    self.config = config
    if skip:
      self.skip = _linear(2 * width, width, dtype, rngs)
    self.norm1 = _layer_norm(width, rngs)
    self.qkv = _linear(width, 3 * width, dtype, rngs)
    self.proj = _linear(width, width, dtype, rngs)
    self.norm2 = _layer_norm(width, rngs)
    self.fc1 = _linear(width, inner, dtype, rngs)
    self.fc2 = _linear(inner, width, dtype, rngs)

  def __call__(
    self, x: Float[Array, "b t c"], skip: Float[Array, "b t c"] | None = None
  ) -> Float[Array, "b t c"]:
    if skip is not None:
      x = self.skip(jnp.concatenate([x, skip], -1))
    b, t, width = x.shape
    qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, self.config.heads, -1)
    q, k, v = (qkv[:, :, i] for i in range(3))
    y = attention(q, k, v, self.config.attention)
    x = x + self.proj(y.reshape(b, t, width))
    return x + self.fc2(nnx.gelu(self.fc1(self.norm2(x))))


class CodeEmbedding(nnx.Module):
  """Embeddings and output table from code values.

  A Linear embeds the values. The output table is an MLP of them: with a Linear the logits would
  have no higher rank than the values, 16, and could not favour two codes over one between them.
  """

  def __init__(
    self,
    config: MaskGITConfig,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
    codes: Float[Array, "v c"] | None = None,
  ):
    width, dim = config.width, config.code_dim
    self.codes = Codes(jnp.zeros((config.codebook_size, dim)) if codes is None else codes)
    self.embed = _linear(dim, width, jnp.float32, rngs)
    self.mask = nnx.Param(_normal(rngs.params(), (width,)))
    self.fc1 = _linear(dim, width, dtype, rngs, std=dim**-0.5)
    self.fc2 = _linear(width, width, dtype, rngs, std=1 / width)

  def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
    """Float32 embeddings; id V is the mask."""
    codes = self._values()
    masked = (ids == len(codes))[..., None]
    # Gather before the Linear: embedding all V codes would take more work than the tokens' do.
    return jnp.where(masked, self.mask[...], self.embed(codes[jnp.minimum(ids, len(codes) - 1)]))

  def table(self) -> Float[Array, "v c"]:
    """Output table."""
    return self.fc2(nnx.gelu(self.fc1(self._values())))

  def _values(self) -> Float[Array, "v c"]:
    """Code values scaled to a mean square of 1: small values would leave the MLP its bias alone."""
    codes = self.codes[...]
    return codes * jax.lax.rsqrt(jnp.square(codes).mean() + 1e-12)


class TableEmbedding(nnx.Module):
  """One learned table for embeddings and output."""

  def __init__(self, config: MaskGITConfig, dtype: DTypeLike, rngs: nnx.Rngs):
    self.dtype = dtype
    self.embedding = nnx.Param(_normal(rngs.params(), (config.codebook_size, config.width)))
    self.mask = nnx.Param(_normal(rngs.params(), (config.width,)))

  def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
    """Float32 embeddings; id V is the mask."""
    table = self.embedding[...]
    masked = (ids == len(table))[..., None]
    return jnp.where(masked, self.mask[...], table[jnp.minimum(ids, len(table) - 1)])

  def table(self) -> Float[Array, "v c"]:
    """Output table."""
    return self.embedding[...].astype(self.dtype)


class FactorEmbedding(nnx.Module):
  """One learned table of the factors' codes: a code's embedding is the sum of its digits' rows."""

  def __init__(self, config: MaskGITConfig, dtype: DTypeLike, rngs: nnx.Rngs):
    assert config.factors is not None
    self.dtype, self.config = dtype, config
    self.digits = nnx.Param(_normal(rngs.params(), (config.outputs, config.width)))
    self.mask = nnx.Param(_normal(rngs.params(), (config.width,)))

  def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
    """Float32 embeddings of whole images; id V is the mask."""
    assert self.config.factors is not None
    masked = (ids == self.config.mask_id)[..., None]
    return jnp.where(masked, self.mask[...], self.config.factors.embed(self.digits[...], ids))

  def table(self) -> Float[Array, "rows c"]:
    """Output table, of the factors' codes."""
    return self.digits[...].astype(self.dtype)


class MaskGIT(nnx.Module):
  """Predicts tokens from those that are not masked, and from a condition.

  Args:
    config: its shape.
    codes: the tokenizer's code values [V, code_dim] (`quantizer.values()`), for embedding "codes";
      zeros, to be set by `set_codes`, if not given.
    dtype: of the computation; weights, norms and logits are float32.
    remat: recompute blocks in the backward pass instead of keeping what is inside them.
  """

  def __init__(
    self,
    config: MaskGITConfig,
    *,
    codes: Float[Array, "v c"] | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: bool = False,
    rngs: nnx.Rngs,
  ):
    self.config, self.dtype, self.remat = config, dtype, remat
    width = config.width
    if config.embedding == "codes":
      self.embedding = CodeEmbedding(config, dtype, rngs, codes)
    elif config.embedding == "table":
      self.embedding = TableEmbedding(config, dtype, rngs)
    else:
      self.embedding = FactorEmbedding(config, dtype, rngs)
    if config.text:
      self.condition = TextCondition(config.text, width, dtype, rngs)
    else:
      self.condition = ClassCondition(config.num_classes + 1, width, rngs)
    self.positions = nnx.List(
      [nnx.Param(_normal(rngs.params(), (p, p, width))) for p in config.patch_sizes]
    )
    self.level = nnx.Param(_normal(rngs.params(), (len(config.patch_sizes), width)))
    half = config.depth // 2
    self.blocks_in = nnx.List([Block(config, dtype, rngs) for _ in range(half)])
    self.block_mid = Block(config, dtype, rngs)
    self.blocks_out = nnx.List([Block(config, dtype, rngs, skip=True) for _ in range(half)])
    self.norm = _layer_norm(width, rngs)
    self.head1 = _linear(width, 2 * width, dtype, rngs)
    self.head2 = _linear(2 * width, width, dtype, rngs)
    self.head_norm = _layer_norm(width, rngs)
    self.bias = nnx.Param(jnp.zeros(config.outputs))

  def set_codes(self, values: Float[Array, "v c"]) -> None:
    """Sets the code values of embedding "codes"; does nothing for the others.

    Raises:
      UserError: their number or width is another than the config's.
    """
    wanted = self.config.codebook_size, self.config.code_dim
    if values.shape != wanted:
      raise UserError(f"code values of shape {values.shape}; the model is made for {wanted}")
    if isinstance(self.embedding, CodeEmbedding):
      self.embedding.codes[...] = jnp.asarray(values, jnp.float32)

  def __call__(
    self, ids: Int[Array, "b n"], condition: Int[Array, "b"] | Float[Array, "b t e"]
  ) -> Float[Array, "b n d"]:
    """Hidden states, of which `logits` makes logits.

    Args:
      ids: codes of all levels; `config.mask_id` where a token is masked.
      condition: what `self.condition` takes: classes, `config.null_class` for none, or embeddings
        of texts.
    """
    grids = [p[...].reshape(-1, self.config.width) for p in self.positions]
    position = jnp.concatenate(grids) + self.level[...][self.config.levels]
    tokens = self.embedding(ids) + position
    front = self.condition(condition)
    x = jnp.concatenate([front, tokens], 1).astype(self.dtype)
    run = nnx.remat(Block.__call__) if self.remat else Block.__call__
    skips = []
    for block in self.blocks_in:
      x = run(block, x)
      skips.append(x)
    x = run(self.block_mid, x)
    for block in self.blocks_out:
      x = run(block, x, skips.pop())
    x = self.norm(x[:, front.shape[1] :])
    return self.head_norm(self.head2(nnx.gelu(self.head1(x)))).astype(self.dtype)

  def output_table(self) -> tuple[Float[Array, "v d"], Float[Array, "v"]]:
    """(table, bias): logits are hidden tableᵀ + bias, of codes or of `config.factors`' rows."""
    return self.embedding.table(), self.bias[...]

  def logits(self, hidden: Float[Array, "*b d"]) -> Float[Array, "*b v"]:
    """Float32 logits of hidden states."""
    table, bias = self.output_table()
    hidden = hidden.astype(table.dtype)
    return jnp.matmul(hidden, table.T, preferred_element_type=jnp.float32) + bias
