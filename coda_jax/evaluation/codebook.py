"""How a tokenizer uses its codebook: counts of every code at every level and their summaries."""

import functools
import itertools
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Int, Integer

from coda_jax.evaluation.reconstruction import Batch

Counts = Array | np.ndarray


def count_codes(
  ids: Sequence[Int[Array, "..."]], ranges: Sequence[tuple[int, int]]
) -> list[Int[Array, "_"]]:
  """How often each level uses each of its codes, on the device (jit-friendly).

  Args:
    ranges: of the levels' ids, `TokenGrids.ranges`.
  """
  levels = zip(ids, ranges, strict=True)
  return [jnp.bincount(jnp.ravel(x) - first, length=stop - first) for x, (first, stop) in levels]


def over_levels(counts: Sequence[Counts], codebook_size: int) -> Counts:
  """Counts of each of the V codes by those of the levels, which share codes or have their own."""
  if _shared([len(x) for x in counts], codebook_size):
    return functools.reduce(operator.add, counts)
  # jnp would cut int64 to int32.
  on_host = isinstance(counts[0], np.ndarray)
  return np.concatenate(counts) if on_host else jnp.concatenate(counts)


def _shared(level_codes: Sequence[int], codebook_size: int) -> bool:
  """Whether all levels choose from the same codes; codes of their own are V together."""
  return sum(level_codes) > codebook_size


def _firsts(codebook_size: int, level_codes: Sequence[int]) -> list[int]:
  """The first id of each level."""
  if _shared(level_codes, codebook_size):
    return [0] * len(level_codes)
  return [0, *itertools.accumulate(level_codes)][:-1]


def code_age(age: Integer[Counts, "v"], counts: Integer[Counts, "v"]) -> Integer[Counts, "v"]:
  """Steps since each code was last used, given the ages before a step and the step's counts."""
  return (age + 1) * (counts == 0)


@struct.dataclass
class CodebookUsage:
  """How often codes were used. `merge` adds the counts of other images or other hosts.

  Attributes:
    counts: of each level those of its codes, int64. Levels share the V codes, or have their own,
      one level's after the other's, V together.
    codebook_size: V.
  """

  counts: tuple[Integer[np.ndarray, "_"], ...]
  codebook_size: int = struct.field(pytree_node=False)

  @classmethod
  def empty(cls, codebook_size: int, level_codes: Sequence[int]) -> "CodebookUsage":
    return cls(tuple(np.zeros(n, np.int64) for n in level_codes), codebook_size)

  @classmethod
  def of(cls, batch: Batch) -> "CodebookUsage":
    return cls.count(batch.result.ids, batch.result.codebook_size, batch.result.level_codes)

  @classmethod
  def count(
    cls,
    ids: Sequence[Integer[np.ndarray | jax.Array, "..."]],
    codebook_size: int,
    level_codes: Sequence[int] = (),
  ) -> "CodebookUsage":
    """Usage by the `ids` of each level, of any shape.

    Args:
      level_codes: how many codes the tokens of each level choose from; () is V.
    """
    level_codes = level_codes or (codebook_size,) * len(ids)
    levels = zip(ids, _firsts(codebook_size, level_codes), level_codes, strict=True)
    counts = [np.bincount(np.ravel(level) - first, minlength=n) for level, first, n in levels]
    assert [len(x) for x in counts] == list(level_codes), "an id is not of its level"
    return cls(tuple(x.astype(np.int64) for x in counts), codebook_size)

  def merge(self, other: "CodebookUsage") -> "CodebookUsage":
    counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
    return CodebookUsage(counts, self.codebook_size)

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
    return np.asarray(over_levels(self.counts, self.codebook_size))

  def at_level(self, level: int) -> np.ndarray:
    """Counts of each code at one level [V]."""
    sizes = [len(x) for x in self.counts]
    first, out = _firsts(self.codebook_size, sizes)[level], np.zeros(self.codebook_size, np.int64)
    out[first : first + sizes[level]] = self.counts[level]
    return out

  @property
  def tokens(self) -> int:
    """Tokens counted."""
    return sum(int(x.sum()) for x in self.counts)

  @property
  def utilization(self) -> float:
    """Fraction of the codes that some level used."""
    return float(np.mean(self.overall > 0))

  @property
  def level_utilization(self) -> np.ndarray:
    """Fraction of its codes that each level used [levels]."""
    return np.array([np.mean(x > 0) for x in self.counts])

  @property
  def perplexity(self) -> float:
    """exp of the entropy of the codes' frequencies over all levels: V if all are used alike."""
    return _perplexity(self.overall)

  @property
  def level_perplexity(self) -> np.ndarray:
    """The same per level [levels]."""
    return np.array([_perplexity(x) for x in self.counts])

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
    return self.tokens / self.codebook_size

  @property
  def level_tokens_per_code(self) -> np.ndarray:
    """The same per level [levels]."""
    return np.array([x.mean() for x in self.counts])

  @property
  def uniform_level_utilization(self) -> np.ndarray:
    """`level_utilization` if all codes were equally likely, on average [levels]."""
    return np.array([1 - (1 - 1 / len(x)) ** x.sum() for x in self.counts])


def _perplexity(counts: np.ndarray) -> float:
  p = counts / max(counts.sum(), 1)
  return float(np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)))))
