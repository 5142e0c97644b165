"""The ways to make codes of coordinates; each gives the factors of every token level.

A level is a list of factors, a factor (indices of its coordinates, codebook [codes, coordinates]).
"""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from coda_jax.discretization import coding
from coda_jax.errors import UserError

_MOST_LEVELS = 256  # of one coordinate
_ROUNDS, _SAMPLES_PER_CODE = 12, 64  # of k-means, at most
_FEWEST_SAMPLES, _MOST_CODES = 8, 4096  # for a code of `vq`; of a codebook, for k-means' time
_ELEMENTS = 2**23  # distances at a time


class Factor(NamedTuple):
  """A codebook [codes, coordinates] and the coordinates that it is for."""

  coordinates: list[int]
  codes: np.ndarray


Levels = list[list[Factor]]


class Budget(NamedTuple):
  """Bits of a block, and how many codes a token may have."""

  bits: float
  codes: int


def lloyd_max(
  x: Float[np.ndarray, "n d"], variances: Float[np.ndarray, "d"], budget: Budget
) -> Levels:
  """Scalar levels for each coordinate, bits by marginal gain, packed into tokens."""
  del variances
  sources = [coding.LloydMax(column) for column in x.T]
  counts = coding.allocate(sources, budget.bits, min(budget.codes, _MOST_LEVELS))
  factors = [Factor([i], sources[i].levels(n)[:, None]) for i, n in enumerate(counts)]
  return _packed(factors, budget.codes)


def token_bridge(
  x: Float[np.ndarray, "n d"], variances: Float[np.ndarray, "d"], budget: Budget
) -> Levels:
  """The same number of levels for every channel (TokenBridge, arXiv 2503.16430).

  A channel of variance 1 is cut where a normal distribution has equal shares; a level is the
  distribution's mean in its share.
  """
  del variances
  n = coding.codes_of(budget.bits / x.shape[1], budget.codes)
  if n < 2:
    raise UserError(
      f"token-bridge gives all {x.shape[1]} channels as many levels: --bits must be at least"
      f" {x.shape[1]} for each latent, not {budget.bits:.3g}"
    )
  normal = statistics.NormalDist()
  density = [0.0, *(normal.pdf(normal.inv_cdf(i / n)) for i in range(1, n)), 0.0]
  levels = -n * np.diff(density)
  return _packed([Factor([i], levels[:, None]) for i in range(x.shape[1])], budget.codes)


def vq(x: Float[np.ndarray, "n d"], variances: Float[np.ndarray, "d"], budget: Budget) -> Levels:
  """A codebook of vectors for each group of coordinates, by k-means.

  A codebook has as many codes as a token, or the square root or a higher one of that where so many
  are too many for the samples or for k-means; then a token holds several. A coordinate that needs
  more is alone.
  """
  roots = (math.floor(budget.codes ** (1 / n) + 1e-9) for n in itertools.count(1))
  at_most = max(2, min(_MOST_CODES, len(x) // _FEWEST_SAMPLES))
  most = next(k for k in roots if k <= at_most)
  factors = [Factor(g, _codes(x[:, g], k)) for g, k in _groups(variances, budget, most)]
  return _packed(factors, budget.codes)


def gaussian(
  x: Float[np.ndarray, "n d"], variances: Float[np.ndarray, "d"], budget: Budget
) -> Levels:
  """Random codes for each group of coordinates (Gaussian Quant, arXiv 2512.06609).

  Codes of a Gaussian source that reach the bound are drawn from a Gaussian too, whose variance is
  the source's less the error (Cover and Thomas, section 10.3.2).
  """
  del x
  rng = np.random.default_rng(0)
  level = coding.water_level(variances, budget.bits)
  std = np.sqrt(np.maximum(variances - level, 0))
  return [
    [Factor(g, rng.standard_normal((k, len(g))) * std[g])]
    for g, k in _groups(variances, budget, budget.codes)
  ]


METHODS: dict[str, Callable[[np.ndarray, np.ndarray, Budget], Levels]] = {
  "vq": vq,
  "lloyd-max": lloyd_max,
  "gaussian": gaussian,
  "token-bridge": token_bridge,
}


def quantized(
  x: Float[np.ndarray, "n d"], levels: Sequence[Sequence[Factor]]
) -> Float[np.ndarray, "n d"]:
  """Coordinates as their codes have them; 0 where there is no code."""
  out = np.zeros_like(x)
  for factor in (f for level in levels for f in level):
    i = factor.coordinates
    out[:, i] = factor.codes[nearest(x[:, i], factor.codes)]
  return out


def _packed(factors: Sequence[Factor], most: int) -> Levels:
  """Tokens of at most `most` codes, each a product of factors; those of one code are left out."""
  tokens = coding.pack([math.log2(len(f.codes)) for f in factors], math.log2(most))
  return [[factors[i] for i in token] for token in tokens]


def _groups(variances: np.ndarray, budget: Budget, most: int) -> list[tuple[list[int], int]]:
  """Groups of coordinates and the number of codes of each, bits as for Gaussians.

  A group has at most `most` codes, or one coordinate of at most those of a token.
  """
  bits = np.minimum(coding.gaussian_bits(variances, budget.bits), math.log2(budget.codes))
  groups = coding.pack(bits.tolist(), math.log2(most))
  sized = [(g, round(2 ** bits[g].sum() - 0.5)) for g in groups]
  return [(g, k) for g, k in sized if k >= 2]


def _codes(x: np.ndarray, k: int) -> Float[np.ndarray, "k m"]:
  return k_means(x, k) if x.shape[1] > 1 else coding.LloydMax(x[:, 0]).levels(k)[:, None]


def nearest(x: np.ndarray, codes: np.ndarray) -> Int[np.ndarray, "n"]:
  """The nearest code of each row."""
  x, codes = x.astype(np.float32), codes.astype(np.float32)
  half, rows = np.square(codes).sum(1) / 2, max(1, _ELEMENTS // len(codes))
  parts = (x[i : i + rows] for i in range(0, len(x), rows))
  return np.concatenate([np.argmin(half - part @ codes.T, 1) for part in parts])


def k_means(x: np.ndarray, k: int) -> Float[np.ndarray, "k m"]:
  """Lloyd's iterations from samples; a code that none takes becomes a far sample."""
  if len(x) < 2 * k:
    raise UserError(
      f"{len(x)} blocks of latents are too few for {k} codes; read more --images or set a lower"
      " --codes"
    )
  x = x[np.random.default_rng(0).permutation(len(x))[: _SAMPLES_PER_CODE * k]].astype(np.float64)
  codes = x[:k]
  for _ in range(_ROUNDS):
    ids = nearest(x, codes)
    count = np.bincount(ids, minlength=k)
    sums = np.stack([np.bincount(ids, column, k) for column in x.T], 1)
    means = sums / np.maximum(count, 1)[:, None]
    far = np.argsort(-np.square(x - codes[ids]).sum(1))[: np.sum(count == 0)]
    codes = means
    codes[count == 0] = x[far]
  return codes
