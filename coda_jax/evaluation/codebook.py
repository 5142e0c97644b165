"""How a tokenizer uses its codebook: counts of every code at every level and their summaries."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, Integer

from coda_jax.evaluation.reconstruction import Batch


def count_codes(ids: Sequence[Int[Array, "..."]], codebook_size: int) -> Int[Array, "levels v"]:
  """How often each level uses each code, on the device (jit-friendly)."""
  return jnp.stack([jnp.bincount(jnp.ravel(level), length=codebook_size) for level in ids])


def code_age(
  age: Integer[jax.Array | np.ndarray, "v"], counts: Integer[jax.Array | np.ndarray, "v"]
) -> Integer[jax.Array | np.ndarray, "v"]:
  """Steps since each code was last used, given the ages before a step and the step's counts."""
  return (age + 1) * (counts == 0)


@struct.dataclass
class CodebookUsage:
  """How often codes were used. `merge` adds the counts of other images or other hosts.

  Attributes:
    counts: [levels, V], int64.
    level_codes: how many codes the tokens of each level choose from; () is V.
  """

  counts: Integer[np.ndarray, "levels v"]
  level_codes: tuple[int, ...] = struct.field(pytree_node=False, default=())

  @classmethod
  def empty(
    cls, levels: int, codebook_size: int, level_codes: tuple[int, ...] = ()
  ) -> "CodebookUsage":
    return cls(np.zeros((levels, codebook_size), np.int64), level_codes)

  @classmethod
  def of(cls, batch: Batch) -> "CodebookUsage":
    return cls.count(batch.result.ids, batch.result.codebook_size, batch.result.level_codes)

  @classmethod
  def count(
    cls,
    ids: Sequence[Integer[np.ndarray | jax.Array, "..."]],
    codebook_size: int,
    level_codes: tuple[int, ...] = (),
  ) -> "CodebookUsage":
    """Usage by the `ids` of each level, of any shape."""
    levels = [np.bincount(np.ravel(level), minlength=codebook_size) for level in ids]
    return cls(np.stack(levels).astype(np.int64), level_codes)

  def merge(self, other: "CodebookUsage") -> "CodebookUsage":
    return CodebookUsage(self.counts + other.counts, self.level_codes)

  def summary(self) -> dict[str, float]:
    """Scalars by name; levels count from 1."""
    levels = enumerate(self.level_utilization, 1)
    return {
      "codebook_utilization": self.utilization,
      "codebook_perplexity": self.perplexity,
      "tokens_per_code": self.tokens_per_code,
    } | {f"codebook_utilization/level_{i}": float(x) for i, x in levels}

  @property
  def overall(self) -> np.ndarray:
    """Counts of each code over all levels [V]."""
    return self.counts.sum(axis=0)

  @property
  def utilization(self) -> float:
    """Fraction of the codes that some level used."""
    return float(np.mean(self.overall > 0))

  @property
  def level_utilization(self) -> np.ndarray:
    """Fraction of its codes that each level used [levels]."""
    return np.sum(self.counts > 0, axis=1) / self._codes

  @property
  def perplexity(self) -> float:
    """exp of the entropy of the codes' frequencies over all levels: V if all are used alike."""
    return float(_perplexity(self.overall[None])[0])

  @property
  def level_perplexity(self) -> np.ndarray:
    """The same per level [levels]."""
    return _perplexity(self.counts)

  @property
  def entropy(self) -> float:
    """Entropy of the codes' frequencies over all levels, in bits a token; log2 V at most."""
    return float(np.log2(self.perplexity))

  @property
  def level_entropy(self) -> np.ndarray:
    """The same per level [levels]."""
    return np.log2(self.level_perplexity)

  @property
  def tokens_per_code(self) -> float:
    """Tokens counted / codes. Below a few, utilization says nothing: state this beside it."""
    return float(self.counts.sum() / self.counts.shape[1])

  @property
  def level_tokens_per_code(self) -> np.ndarray:
    """The same per level [levels]."""
    return self.counts.sum(axis=1) / self._codes

  @property
  def uniform_level_utilization(self) -> np.ndarray:
    """`level_utilization` if all codes were equally likely, on average [levels]."""
    return 1 - (1 - 1 / self._codes) ** self.counts.sum(axis=1)

  @property
  def _codes(self) -> np.ndarray:
    """How many codes each level chooses from [levels]."""
    levels, size = self.counts.shape
    return np.array(self.level_codes or (size,) * levels, np.float64)


def _perplexity(counts: np.ndarray) -> np.ndarray:
  p = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  return np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)), axis=1))
