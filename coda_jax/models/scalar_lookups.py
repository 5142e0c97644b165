"""Look-ups that round each of a few numbers by itself: FSQ, LFQ, BSQ.

A projection makes d numbers of a vector, each is rounded to one of a few levels, and a second
projection makes a value of the d levels. An id is its levels' numbers in mixed radix, the first
number's the lowest. No codebook is stored or searched: time and memory hardly depend on V.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from coda_jax.errors import UserError
from coda_jax.models.lookup_base import Found, Lookup, QuantizerConfig

# By V: the levels that the paper's Table 1 takes for 2^8, 2^10, 2^12, 2^14 and 2^16 codes.
FSQ_LEVELS = {
  math.prod(levels): levels
  for levels in ((8, 6, 5), (8, 5, 5, 5), (7, 5, 5, 5, 5), (8, 8, 8, 6, 5), (8, 8, 8, 5, 5, 5))
}
_TINY = 1e-30  # keeps the gradient of p log p finite at p = 0


class ScalarLookup(Lookup):
  """Base of these look-ups. Parameters: the projections `project_in` and `project_out`.

  The value is the projection of y + sg(ŷ − y): the gradient passes straight through rounding.
  The projections start as an orthonormal map and its transpose, so that values start near vectors:
  random ones that do not fit each other would amplify the residual from level to level.
  """

  def __init__(self, config: QuantizerConfig, *, rngs: nnx.Rngs):
    super().__init__(config, rngs=rngs)
    c, d = config.code_dim, len(self.radices(config))
    start = nnx.initializers.orthogonal()(rngs.params(), (c, d))
    ends = (c, d, start), (d, c, start.T / self._size)
    self.project_in, self.project_out = (
      nnx.Linear(cin, cout, precision="highest", kernel_init=lambda *_, x=x: x, rngs=rngs)
      for cin, cout, x in ends
    )

  @property
  def _size(self) -> float:
    """The largest level."""
    return 1.0

  @classmethod
  def radices(cls, config: QuantizerConfig) -> tuple[int, ...]:
    """Levels of each number; their product is V. Raises UserError if V is no such product."""
    raise NotImplementedError

  @classmethod
  def check(cls, config: QuantizerConfig) -> None:
    super().check(config)
    cls.radices(config)

  def numbers(self, x: Float[Array | np.ndarray, "n c"]) -> Float[Array, "n d"]:
    """The numbers y of vectors, before rounding."""
    raise NotImplementedError

  def digits(self, y: Float[Array, "n d"]) -> Int[Array, "n d"]:
    """The number of the nearest level, from 0."""
    raise NotImplementedError

  def points(self, digits: Int[Array, "n d"]) -> Float[Array, "n d"]:
    """The levels ŷ of these numbers."""
    raise NotImplementedError

  def losses(
    self, y: Float[Array, "n d"], points: Float[Array, "n d"]
  ) -> tuple[Float[Array, ""] | float, Float[Array, ""] | float]:
    """(quantization loss, entropy loss); none by default."""
    del y, points
    return 0.0, 0.0

  def all_points(self) -> Float[Array, "v d"]:
    """The levels of every id."""
    levels = np.array(self.radices(self.config), np.int32)
    ids = jnp.arange(self.config.codebook_size, dtype=jnp.int32)[:, None]
    return self.points(ids // self._places() % levels)

  def values(self) -> Float[Array, "v c"]:
    return self.project_out(self.all_points())

  def confidence(self, x: Float[Array | np.ndarray, "n c"]) -> Float[Array, "n v"]:
    """Minus the distance to the code before the second projection, where ids are found."""
    return -jnp.linalg.norm(self.numbers(x)[:, None] - self.all_points(), axis=-1)

  def codes(self) -> tuple[()]:
    return ()

  def ids(self, x: Float[Array, "n c"], codes: tuple[()]) -> Int[Array, "n"]:
    return self._join(self.digits(self.numbers(x)))

  def look_up(self, x: Float[Array, "n c"], codes: tuple[()]) -> Found:
    y = self.numbers(x)
    digits = self.digits(y)
    points = self.points(digits)
    values = self.project_out(y + jax.lax.stop_gradient(points - y))
    return Found(self._join(digits), values, codes, *self.losses(y, points))

  def _join(self, digits: Int[Array, "n d"]) -> Int[Array, "n"]:
    return (digits * self._places()).sum(1)

  def _places(self) -> np.ndarray:
    """What a 1 of each number counts in an id."""
    return np.cumprod([1, *self.radices(self.config)[:-1]], dtype=np.int32)


class FiniteScalarLookup(ScalarLookup):
  """FSQ, finite scalar quantization (Mentzer et al., arXiv 2309.15505, section 3, appendix A.1).

  A tanh bounds each number to its L levels, whole numbers, which are divided by ⌊L/2⌋. Neither a
  codebook loss nor an entropy loss is needed: the projections learn from the reconstruction.
  """

  @classmethod
  def radices(cls, config: QuantizerConfig) -> tuple[int, ...]:
    size = config.codebook_size
    levels = config.fsq_levels or FSQ_LEVELS.get(size, ())
    if not levels:
      raise UserError(
        f"quantizer.codebook_size is {size}; for the fsq look-up give quantizer.fsq_levels with "
        f"this product, or take {', '.join(map(str, FSQ_LEVELS))}, of the paper's levels"
      )
    if min(levels) < 2 or math.prod(levels) != size:
      raise UserError(
        f"quantizer.fsq_levels is {levels}; levels are at least 2, and their product is "
        f"quantizer.codebook_size, {size}"
      )
    return levels

  def numbers(self, x: Float[Array | np.ndarray, "n c"]) -> Float[Array, "n d"]:
    levels = np.array(self.radices(self.config))
    half = (levels - 1) * (1 - 1e-3) / 2  # the outermost levels must be reached before infinity
    offset = np.where(levels % 2 == 1, 0, 0.5)
    shift = np.tan(offset / half)
    bounded = jnp.tanh(self.project_in(jnp.asarray(x)) + np.float32(shift)) * np.float32(half)
    return (bounded - np.float32(offset)) / self._width()

  def digits(self, y: Float[Array, "n d"]) -> Int[Array, "n d"]:
    return (jnp.round(y * self._width()) + self._width()).astype(jnp.int32)

  def points(self, digits: Int[Array, "n d"]) -> Float[Array, "n d"]:
    return (digits - self._width()) / self._width()

  def _width(self) -> np.ndarray:
    return np.array(self.radices(self.config), np.float32) // 2


class BinaryLookup(ScalarLookup):
  """Base of the look-ups whose d numbers are bits: V = 2^d, and the levels are ±`_size`.

  The soft code of a vector has probabilities softmax(−|y − ŷ|²/τ) over all V codes ŷ. These are
  products over bits, p(bit k is 1) = sigmoid(4·size·y_k/τ). The losses are beta·mean((y − sg ŷ)²)
  and the entropy loss E H(p) − H(E p), in nats.
  """

  @classmethod
  def radices(cls, config: QuantizerConfig) -> tuple[int, ...]:
    bits = config.codebook_size.bit_length() - 1
    if bits < 1 or config.codebook_size != 2**bits:
      raise UserError(
        f"quantizer.codebook_size is {config.codebook_size}; for the {config.lookup} look-up it "
        "is a power of 2"
      )
    return (2,) * bits

  def digits(self, y: Float[Array, "n d"]) -> Int[Array, "n d"]:
    return (y > 0).astype(jnp.int32)

  def points(self, digits: Int[Array, "n d"]) -> Float[Array, "n d"]:
    return (2 * digits - 1) * jnp.float32(self._size)

  def losses(
    self, y: Float[Array, "n d"], points: Float[Array, "n d"]
  ) -> tuple[Float[Array, ""], Float[Array, ""]]:
    logits = (4 * self._size / self.config.entropy_temperature) * y
    size = jnp.abs(logits)  # H(p) = H(1 − p), and the smaller has no cancellation
    entropy = (jax.nn.softplus(-size) + size * jax.nn.sigmoid(-size)).sum(1).mean()
    commitment = jnp.square(y - jax.lax.stop_gradient(points)).mean()
    return self.beta * commitment, entropy - self.codebook_entropy(logits)

  def codebook_entropy(self, logits: Float[Array, "n d"]) -> Float[Array, ""]:
    """H(E p) of the bits' logits; from 0 to log V."""
    raise NotImplementedError


class LookupFree(BinaryLookup):
  """LFQ, look-up-free quantization (MAGVIT-v2; Yu et al., arXiv 2310.05737, section 3.1).

  A bit is the sign of its number. The codebook's entropy is exact: E p over all codes is a product
  of two matrices, tokens x codes of half the bits each, so tokens x V is never held.
  """

  default_beta = 0.25

  def numbers(self, x: Float[Array | np.ndarray, "n c"]) -> Float[Array, "n d"]:
    return self.project_in(jnp.asarray(x))

  def codebook_entropy(self, logits: Float[Array, "n d"]) -> Float[Array, ""]:
    n, d = logits.shape
    halves = _joint(logits[:, : d // 2]), _joint(logits[:, d // 2 :])
    return _entropy(jnp.matmul(halves[0].T, halves[1], precision="highest") / n)


class BinarySphericalLookup(BinaryLookup):
  """BSQ, binary spherical quantization (Zhao et al., arXiv 2406.07548, section 4).

  As LFQ, on the unit sphere: numbers have length 1 and levels are ±1/√d. The codebook's entropy is
  the sum of the bits' entropies, the paper's approximation; it is exact if bits are independent.
  The error is bounded, so that the commitment's weight is 0 unless the config has one.
  """

  default_beta = 0.0

  @property
  def _size(self) -> float:
    return len(self.radices(self.config)) ** -0.5

  def numbers(self, x: Float[Array | np.ndarray, "n c"]) -> Float[Array, "n d"]:
    y = self.project_in(jnp.asarray(x))
    return y * jax.lax.rsqrt(jnp.square(y).sum(1, keepdims=True) + 1e-12)

  def codebook_entropy(self, logits: Float[Array, "n d"]) -> Float[Array, ""]:
    return sum((_entropy(jax.nn.sigmoid(s * logits).mean(0)) for s in (1, -1)), jnp.zeros(()))


def _joint(logits: Float[Array, "n d"]) -> Float[Array, "n v"]:
  """Probabilities of the 2^d codes of independent bits, the first bit the lowest."""
  out = jnp.ones((len(logits), 1))
  for k in range(logits.shape[1]):
    zero, one = (jax.nn.sigmoid(s * logits[:, k : k + 1]) for s in (-1, 1))
    out = jnp.concatenate([out * zero, out * one], 1)
  return out


def _entropy(p: Float[Array, "*s"]) -> Float[Array, ""]:
  return -(p * jnp.log(p + _TINY)).sum()
