"""Precision and recall of samples by nearest neighbours (Kynkaanniemi et al., arXiv 1904.06991).

As ADM computes them: a ball around every image reaches to its third nearest neighbour of the same
set; precision is the part of the samples that lie in a ball of a real image, recall the part of the
real images that lie in a ball of a sample. ADM rounds features and distances to float16 where they
fit; these are float32.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from coda_jax.errors import UserError
from coda_jax.evaluation.rows import Rows

_BLOCK = 2048  # rows and columns of a block of distances


def _distances(a, b):
  """[n, m] squared Euclidean."""
  exact = jax.lax.Precision.HIGHEST
  norms = jnp.sum(a * a, axis=1)[:, None] + jnp.sum(b * b, axis=1)
  return jnp.maximum(norms - 2 * jnp.matmul(a, b.T, precision=exact), 0)


@jax.jit
def _nearest(
  best: Float[Array, "n k"],
  a: Float[Array | np.ndarray, "n d"],
  b: Float[Array | np.ndarray, "m d"],
  count: int | Array,
) -> Float[Array, "n k"]:
  """The k smallest of `best` and of the distances to the first `count` rows of `b`, ascending."""
  d = jnp.where(jnp.arange(len(b)) < count, _distances(a, b), jnp.inf)
  found, _ = jax.lax.top_k(-jnp.concatenate([best, d], axis=1), best.shape[1])
  return -found


@jax.jit
def _inside(
  a: Float[Array | np.ndarray, "n d"],
  radii_a: Float[Array | np.ndarray, "n"],
  b: Float[Array | np.ndarray, "m d"],
  radii_b: Float[Array | np.ndarray, "m"],
) -> tuple[Bool[Array, "n"], Bool[Array, "m"]]:
  """Which rows of `a` lie in a ball of `b`, and the other way round; a negative radius is none."""
  d = _distances(a, b)
  return jnp.any(d <= radii_b, axis=1), jnp.any(d <= radii_a[:, None], axis=0)


def _padded(x: np.ndarray, size: int, value: float = 0.0) -> np.ndarray:
  """One shape compiles once."""
  return np.pad(x, ((0, size - len(x)),) + ((0, 0),) * (x.ndim - 1), constant_values=value)


def radii(features: Rows | np.ndarray, k: int = 3, block: int = _BLOCK) -> np.ndarray:
  """[N] squared distance of each row to its k-th nearest other row.

  Raises:
    UserError: k rows or fewer.
  """
  rows = Rows.of(features)
  if len(rows) <= k:
    raise UserError(f"precision and recall need more than {k} images on each side, got {len(rows)}")
  size, out = min(block, len(rows)), []
  for x in rows.blocks(size):
    n, x = len(x), _padded(x, size)
    best = jnp.full((size, k + 1), jnp.inf, jnp.float32)  # the nearest is the row itself
    for y in rows.blocks(size):
      best = _nearest(best, x, _padded(y, size), len(y))
    out.append(np.asarray(best)[:n, k])
  return np.concatenate(out)


def precision_recall(
  real: Rows | np.ndarray, samples: Rows | np.ndarray, k: int = 3, block: int = _BLOCK
) -> tuple[float, float]:
  """(precision, recall) of samples; distances are held a block at a time.

  Raises:
    UserError: k images or fewer on a side, or features of two widths.
  """
  real, samples = Rows.of(real), Rows.of(samples)
  if real.width != samples.width:
    raise UserError(f"features of {real.width} and {samples.width} numbers cannot be compared")
  radii_of = functools.partial(radii, k=k, block=block)
  real_radii, sample_radii = radii_of(real), radii_of(samples)
  real_in, sample_in = np.zeros(len(real), bool), np.zeros(len(samples), bool)
  sizes = min(block, len(real)), min(block, len(samples))
  for i, x in enumerate(real.blocks(sizes[0])):
    r = slice(i * sizes[0], i * sizes[0] + len(x))
    ours = _padded(x, sizes[0]), _padded(real_radii[r], sizes[0], -1.0)
    for j, y in enumerate(samples.blocks(sizes[1])):
      s = slice(j * sizes[1], j * sizes[1] + len(y))
      theirs = _padded(y, sizes[1]), _padded(sample_radii[s], sizes[1], -1.0)
      a, b = _inside(*ours, *theirs)
      real_in[r] |= np.asarray(a)[: len(x)]
      sample_in[s] |= np.asarray(b)[: len(y)]
  return float(sample_in.mean()), float(real_in.mean())
