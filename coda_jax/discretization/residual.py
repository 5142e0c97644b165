"""The paper's own quantizer from data, without training.

Codes. Each level gets a part of the codebook: centroids, by k-means, of what the levels before it
leave. A centroid is the mean of what it stands for, so a level seldom adds to the error. Then
rounds of two steps: every token takes the nearest of all codes, and the codes solve least squares
over whole images; the chain's output is linear in the codes when the ids are given.

Look-up. The error that counts is that of the decoded image, so distances are taken in the
coordinates x A of `transforms`. Queries and keys are (x A, s) and (c A, s) with one large s: after
RMS norm their product / √d is √d·g² (1 − |x A − c A|²/2s² + …), whose largest is the nearest code,
and whose softmax is the posterior of equal Gaussians at the codes for the right g. Projections and
norms of the paper hold all of this (Eq. 6 to 8), so the official code reads the result.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from coda_jax import arrays
from coda_jax.discretization import codebooks, coding
from coda_jax.discretization.transforms import fit_transform
from coda_jax.errors import UserError
from coda_jax.models.quantizer import PATCH_SIZES, QuantizerConfig, ResidualQuantizer
from coda_jax.ops.resize import area_resize, bicubic_resize

_ROUNDS, _STEPS = 8, 8  # of ids and codes; of conjugate gradients in each
_RIDGE = 1e-2  # / uses of a code: codes of few tokens stay near where they are
_LIFT = 10.0  # s² / the square of the longest code: the terms behind the distance are small
_BATCH = 16  # images at a time


def fit_residual(
  latents: Float[np.ndarray, "n h w c"],
  gradients: Float[np.ndarray, "m h w c"],
  *,
  bits: float,
  codes: int,
  patch_sizes: tuple[int, ...] = (),
) -> tuple[QuantizerConfig, dict[str, np.ndarray]]:
  """An attention quantizer of at most `bits` an image and its parameters by path.

  Args:
    latents: of the data, scaled.
    gradients: vector-Jacobian products of the decoder with white noise, at such latents.
    codes: of the codebook, at most.
    patch_sizes: sides of the levels' grids; () takes the paper's for these latents.

  Raises:
    UserError: there are no patch sizes for these latents, too few bits or too few images.

  Of the images the last, up to 15, are left out where batches of 16 do not divide them.
  """
  side, channels = latents.shape[1], latents.shape[-1]
  patch_sizes = patch_sizes or PATCH_SIZES.get(side, ())
  if not patch_sizes or patch_sizes[-1] != side or max(patch_sizes) > side:
    raise UserError(
      f"latents of {side}x{side} need --patch-sizes up to {side} that end with {side}"
    )
  tokens = sum(p * p for p in patch_sizes)
  size = coding.codes_of(bits / tokens, codes)
  if size < 2 * len(patch_sizes):
    raise UserError(
      f"--bits {bits:g} are {size} codes for each of {tokens} tokens; {len(patch_sizes)} levels"
      f" need at least {2 * len(patch_sizes)} (--bits, --codes), or fewer --patch-sizes"
    )
  metric = fit_transform(latents, gradients, 1)
  x = (latents @ metric.analysis).astype(np.float32)
  batch = min(_BATCH, len(x))
  x = x[: len(x) // batch * batch]
  nearest = QuantizerConfig(size, patch_sizes, code_dim=channels, lookup="euclidean")
  chain, _ = arrays.split(ResidualQuantizer(nearest, rngs=nnx.Rngs(0)))
  values = jnp.asarray(_start(x, size, patch_sizes))
  x = jnp.asarray(x.reshape(-1, batch, side, side, channels))
  for _ in range(_ROUNDS):
    values = _least_squares(chain, values, _ids(chain, values, x), x)
  ids = _ids(chain, values, x)
  made = jax.lax.map(functools.partial(_decoded, chain, values), ids)
  error = float(jnp.square(made - x).mean())
  config = QuantizerConfig(size, patch_sizes, channels, attn_dim=max(32, channels + 1))
  return config, _parameters(config, np.asarray(values, np.float64), metric.analysis, error)


def _start(
  x: Float[np.ndarray, "n h w c"], size: int, patch_sizes: tuple[int, ...]
) -> Float[np.ndarray, "v c"]:
  """Codes [size, C] of images [N, h, w, C]: of each level in turn, in proportion to its side."""
  (n, h, w, c), residual, found = x.shape, x, []
  left, sides = size, sum(patch_sizes)
  for level, p in enumerate(patch_sizes, 1):
    vectors = np.asarray(area_resize(jnp.asarray(residual), (p, p))).reshape(-1, c)
    k = left if level == len(patch_sizes) else min(max(1, size * p // sides), len(vectors) // 2)
    codes = codebooks.k_means(vectors, k).astype(np.float32)
    values = codes[codebooks.nearest(vectors, codes)].reshape(n, p, p, c)
    residual = residual - np.asarray(bicubic_resize(jnp.asarray(values), (h, w)))
    found.append(codes)
    left -= k
  return np.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _ids(
  chain: nnx.GraphDef, values: Float[Array, "v c"], x: Float[Array, "k b h w c"]
) -> list[Int[Array, "k b _ _"]]:
  """Ids of batches of images."""
  return jax.lax.map(arrays.merge(chain, {"codebook": values}).encode, x)


def _decoded(
  chain: nnx.GraphDef, values: Float[Array, "v c"], ids: list[Int[Array, "b _ _"]]
) -> Float[Array, "b h w c"]:
  """Images of ids; linear in the values."""
  levels = arrays.merge(chain, {"codebook": values}).level_latents(ids, ids[-1].shape[1:])
  return functools.reduce(jnp.add, levels)


@functools.partial(jax.jit, static_argnums=0)
def _least_squares(
  chain: nnx.GraphDef,
  values: Float[Array, "v c"],
  ids: list[Int[Array, "k b _ _"]],
  x: Float[Array, "k b h w c"],
) -> Float[Array, "v c"]:
  """Codes for which images decoded from `ids` are nearest to `x`, by conjugate gradients."""
  uses = sum(i.size for i in ids) / len(values)

  def gradient(codes, centre, scale):
    """Of half the squared distance of the images to scale·x, and of the codes to the centre."""

    def error(codes):
      def batch(total, item):
        made = _decoded(chain, codes, item[0])
        return total + jnp.square(made - scale * item[1]).sum() / 2, None

      change = jnp.square(codes - centre).sum()
      return jax.lax.scan(batch, _RIDGE * uses * change / 2, (ids, x))[0]

    return jax.grad(error)(codes)

  # The error is quadratic: its Hessian's products are gradients too. (jax.linearize would keep
  # tokens x codes.)
  product = functools.partial(gradient, centre=jnp.zeros_like(values), scale=0.0)
  step, _ = jax.scipy.sparse.linalg.cg(product, -gradient(values, values, 1.0), maxiter=_STEPS)
  return values + step


def _parameters(
  config: QuantizerConfig, codes: np.ndarray, analysis: np.ndarray, error: float
) -> dict[str, np.ndarray]:
  """The attention look-up whose nearest codes in coordinates x A are these.

  Args:
    codes: [V, C] in coordinates.
    analysis: A.
    error: mean square of a coordinate's error: the variance of the Gaussians at the codes.
  """
  c, d = analysis.shape[0], config.attn_dim
  longest = math.sqrt(np.square(codes).sum(1).max())  # in its units the norms' epsilon is nothing
  kernel, bias = np.zeros((c, d)), np.zeros(d)
  kernel[:, :c], bias[c] = analysis / longest, math.sqrt(_LIFT)
  sigma = max(math.sqrt(error) / longest, 1e-6)
  scale = np.full(d, math.sqrt(_LIFT / math.sqrt(d)) / sigma)
  parameters = {"codebook": codes @ np.linalg.inv(analysis)}
  parameters |= {"to_v.kernel": np.eye(c), "to_v.bias": np.zeros(c)}
  for name in "qk":
    parameters |= {
      f"to_{name}.kernel": kernel,
      f"to_{name}.bias": bias,
      f"norm_{name}.scale": scale,
    }
  return {path: x.astype(np.float32) for path, x in parameters.items()}
