"""Tokens whose code is the product of a few small ones: digits, losses and logits.

A level of a transform quantizer has K codebooks of V_1, ..., V_K codes, and a token's code counts
all V_1 x ... x V_K combinations. A model that gives every factor logits of its own, from the same
hidden state, needs V_1 + ... + V_K rows where a table of all codes has the product. The softmax
over all codes is then the product of the factors' softmaxes, and nothing is approximated: the
logit of a code is the sum of its digits' logits.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from coda_jax.errors import UserError
from coda_jax.ops.cross_entropy import CrossEntropy

_NOTHING = -1e30  # a logit of what does not exist; finite, so that 0 times its gradient is 0


def factors_by_level(
  level_codes: Sequence[int], factor_codes: Sequence[int]
) -> list[tuple[int, ...]]:
  """The codes of each level's factors, which are as many as make the product of its codes."""
  out, left = [], list(factor_codes)
  for codes in level_codes:
    level, product = [], 1
    while product < codes and left:
      level.append(left.pop(0))
      product *= level[-1]
    out.append(tuple(level))
  return out


class TokenFactors:
  """The layout of tokens of L levels, each of as many tokens and of at most K factors.

  A table has a row for every code of every factor, level after level. The first factor of a token
  is the most significant digit of its id within the level.

  Attributes:
    rows: of a table.
    count: K.

  Raises:
    UserError: factors that do not make the levels' codes, or grids of several sizes.
  """

  def __init__(
    self, patch_sizes: Sequence[int], level_codes: Sequence[int], factor_codes: Sequence[int]
  ):
    levels = factors_by_level(level_codes, factor_codes)
    if [math.prod(x) for x in levels] != list(level_codes) or len(set(patch_sizes)) != 1:
      raise UserError("model: factors do not fit the levels' codes and grids")
    self.rows, self.count = sum(factor_codes), max(map(len, levels))
    self._tokens = patch_sizes[0] ** 2
    self._first_id = np.cumsum([0, *level_codes[:-1]], dtype=np.int32)
    # A factor that a level lacks has one code, whose row, of zeros, is behind the table.
    shape = len(levels), self.count
    self._codes, self._strides = np.ones(shape, np.int32), np.ones(shape, np.int32)
    self._first_row = np.full(shape, self.rows, np.int32)
    row = 0
    for i, level in enumerate(levels):
      for k, codes in enumerate(level):
        self._codes[i, k], self._first_row[i, k] = codes, row
        self._strides[i, k] = math.prod(level[k + 1 :])
        row += codes

  def digits(self, ids: Int[Array, "b n"]) -> Int[Array, "b n k"]:
    """Digits of the ids of whole images."""
    within = ids.reshape(len(ids), -1, self._tokens, 1) - self._first_id[:, None, None]
    found = within // self._strides[:, None] % self._codes[:, None]
    return found.reshape(*ids.shape, self.count)

  def embed(self, table: Float[Array, "rows c"], ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
    """The sum of the rows of each token's digits."""
    rows = self.digits(ids) + np.repeat(self._first_row, self._tokens, 0)
    return jnp.pad(table, ((0, 1), (0, 0)))[rows].sum(2)

  def cross_entropy(
    self,
    hidden: Float[Array, "b n c"],
    table: Float[Array, "rows c"],
    bias: Float[Array, "rows"],
    ids: Int[Array, "b n"],
    *,
    weights: Float[Array, "b n"],
    label_smoothing: float = 0.0,
  ) -> CrossEntropy:
    """As `ops.cross_entropy`, [B, N], of the distribution over the codes of each token's level."""
    digits = self.digits(ids)
    grids = hidden.reshape(len(ids), len(self._codes), self._tokens, -1)
    table = jnp.pad(table.astype(hidden.dtype), ((0, 1), (0, 0)))
    bias = jnp.pad(bias.astype(jnp.float32), (0, 1))
    loss, correct = jnp.zeros(ids.shape), jnp.ones(ids.shape, bool)
    for k in range(self.count):
      rows, there = self._rows_of(np.arange(len(self._codes)), k)
      s = jnp.einsum(
        "blpc,lvc->blpv",
        grids,
        table[rows],
        precision="highest" if hidden.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
      )
      s = (s + bias[rows][:, None]).reshape(*ids.shape, -1)
      there = np.repeat(there, self._tokens, 0)
      s = jnp.where(there, s, _NOTHING)
      chosen = jnp.take_along_axis(s, digits[..., k, None], -1)[..., 0]
      loss += jax.nn.logsumexp(s, -1) - (1 - label_smoothing) * chosen
      if label_smoothing:
        loss -= label_smoothing * jnp.where(there, s, 0.0).sum(-1) / there.sum(-1)
      correct &= chosen == s.max(-1)
    return CrossEntropy(loss * jax.lax.stop_gradient(weights), correct)

  def logits(
    self, of_rows: Float[Array, "*b rows"], level: Int[Array, "*b"]
  ) -> Iterator[Float[Array, "*b _"]]:
    """The logits of each factor's codes, factor by factor, of those of all rows.

    Args:
      level: of each token; a level has fewer codes than the most, and the others have no chance.
    """
    of_rows = jnp.pad(of_rows, [(0, 0)] * (of_rows.ndim - 1) + [(0, 1)])
    for k in range(self.count):
      rows, there = self._rows_of(level, k)
      yield jnp.where(there, jnp.take_along_axis(of_rows, rows, -1), _NOTHING)

  def ids(self, digits: list[Int[Array, "*b"]], level: Int[Array, "*b"]) -> Int[Array, "*b"]:
    """The ids of digits, factor by factor."""
    within = (jnp.asarray(self._strides)[level, k] * x for k, x in enumerate(digits))
    return jnp.asarray(self._first_id)[level] + functools.reduce(jnp.add, within)

  def _rows_of(self, level, k: int):
    """(rows of the codes of factor k of tokens of these levels, which of them exist)."""
    code = np.arange(self._codes[:, k].max())
    codes, first = (jnp.asarray(x)[level, k, None] for x in (self._codes, self._first_row))
    return first + jnp.minimum(code, codes - 1), code < codes
