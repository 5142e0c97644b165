"""Classical source coding: levels of one variable, bits among several, and the bound for Gaussians.

All is float64 NumPy and deterministic. Sources: Lloyd, "Least squares quantization in PCM" (1982);
Max (1960); Cover and Thomas, "Elements of Information Theory", section 10.3.3 (reverse
water-filling); Shoham and Gersho (1988), whose convex hull the allocation follows.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

_ROUNDS, _TOLERANCE = 500, 1e-5
_QUANTILES = 1024
_AHEAD = 4  # levels that one step of the allocation may add: 1 to 3 can pay where 1 to 2 does not


class LloydMax:
  """Levels that minimise the mean squared error of a variable, by samples of it.

  They start with a density that is the cube root of the variable's, which is best where there are
  many levels (Panter and Dite, 1951), and Lloyd's iterations follow.
  """

  def __init__(self, samples: Float[np.ndarray, "n"]):
    x = np.sort(samples.astype(np.float64))
    self._centre = x.mean()
    self._x = x - self._centre  # keeps digits in the sums of squares
    padded = np.concatenate([[0.0], self._x])
    self._sums = np.cumsum(padded), np.cumsum(padded**2)
    self._quantiles = np.quantile(self._x, np.linspace(0, 1, min(_QUANTILES, len(x)) + 1))
    self._share = np.cumsum(np.concatenate([[0.0], np.diff(self._quantiles) ** (2 / 3)]))
    self._found: dict[int, tuple[np.ndarray, float]] = {}

  def levels(self, n: int) -> Float[np.ndarray, "n"]:
    """`n` levels, ascending."""
    return self._solve(n)[0] + self._centre

  def error(self, n: int) -> float:
    """Mean squared error of the samples with `n` levels."""
    return self._solve(n)[1]

  def _solve(self, n: int) -> tuple[np.ndarray, float]:
    if n not in self._found:
      at = (np.arange(n) + 0.5) / n * self._share[-1]
      self._found[n] = self._converge(np.interp(at, self._share, self._quantiles))
    return self._found[n]

  def _converge(self, levels: np.ndarray) -> tuple[np.ndarray, float]:
    last = error = math.inf
    for _ in range(_ROUNDS):
      edges = np.searchsorted(self._x, (levels[1:] + levels[:-1]) / 2)
      edges = np.concatenate([[0], edges, [len(self._x)]])
      count = np.diff(edges)
      total, squares = (np.diff(x[edges]) for x in self._sums)
      levels = np.where(count > 0, total / np.maximum(count, 1), levels)
      spread = squares - total * levels
      error = max(float(spread.sum() / len(self._x)), 0.0)
      empty = np.flatnonzero(count == 0)
      if len(empty) and spread.max() > _TOLERANCE * self._sums[1][-1]:  # they cut the worst cells
        worst = np.argsort(-spread, kind="stable")[: len(empty)]
        step = np.sqrt(np.maximum(spread[worst], 0) / np.maximum(count[worst], 1))
        levels[empty], last = levels[worst] + step, math.inf
        levels.sort()
      elif last - error <= _TOLERANCE * error:
        break
      else:
        last = error
    return levels, error


def allocate(sources: Sequence[LloydMax], bits: float, most: int) -> list[int]:
  """Levels of each source, at most `most`, of log2's sum at most `bits`, with little error in all.

  The step is taken that removes most error a bit, again and again, while one fits.
  """
  counts, left, open_ = [1] * len(sources), bits, set(range(len(sources)))

  @functools.cache
  def best(i: int, n: int) -> tuple[float, int]:
    """(error removed a bit, levels) of the best step from n levels."""
    ahead = range(n + 1, min(n + _AHEAD, most) + 1)
    error = sources[i].error(n)
    steps = [((error - sources[i].error(k)) / math.log2(k / n), k) for k in ahead]
    return max(steps, key=lambda step: step[0], default=(0.0, n))

  while open_:
    gain, i = max((best(i, counts[i])[0], -i) for i in open_)
    i, n = -i, best(-i, counts[-i])[1]
    while n > counts[i] and math.log2(n / counts[i]) > left + 1e-9:
      n -= 1
    if gain <= 0 or n == counts[i]:
      open_.remove(i)
      continue
    left -= math.log2(n / counts[i])
    counts[i] = n
  return counts


def pack(sizes: Sequence[float], capacity: float) -> list[list[int]]:
  """Groups of indices with a sum of sizes of at most `capacity`: each into the first it fits.

  Sizes of 0 are left out; a size above the capacity is a group of its own; groups and indices in
  them keep their order.
  """
  groups, room = [], []
  for i, size in enumerate(sizes):
    if size <= 0:
      continue
    at = next((g for g, left in enumerate(room) if size <= left + 1e-9), len(groups))
    if at == len(groups):
      groups.append([])
      room.append(capacity)
    groups[at].append(i)
    room[at] -= size
  return groups


def codes_of(bits: float, most: int) -> int:
  """How many codes so many bits can tell apart, `most` at most."""
  return math.floor(2 ** min(bits, math.log2(most)) + 1e-9)


def water_level(variances: Float[np.ndarray, "n"], bits: float) -> float:
  """The error of every direction that gets bits, by reverse water-filling of Gaussians.

  A direction of variance v above the level t gets log2(v / t) / 2 bits; these sum to `bits`. The
  least error that any code reaches is the sum of min(v, t).
  """
  ordered = np.sort(variances[variances > 0])[::-1]
  logs = np.cumsum(np.log2(ordered))
  counts = np.arange(1, len(ordered) + 1)
  levels = (logs - 2 * bits) / counts  # log2 of t, if the first k directions get bits
  below = np.concatenate([np.log2(ordered[1:]), [-np.inf]])
  return float(2 ** levels[np.argmax(levels >= below)])


def gaussian_bits(variances: Float[np.ndarray, "n"], bits: float) -> Float[np.ndarray, "n"]:
  """Bits of each direction by reverse water-filling."""
  level = water_level(variances, bits)
  return 0.5 * np.log2(np.maximum(variances, level) / level)


def gaussian_error(variances: Float[np.ndarray, "n"], bits: float) -> float:
  """The least mean squared error, summed over directions, of any code of Gaussians at `bits`."""
  return float(np.minimum(variances, water_level(variances, bits)).sum())
