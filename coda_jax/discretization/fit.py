"""A quantizer from latents and gradients: transform, codes, and what they reach."""

import dataclasses
import math

import numpy as np
from flax import nnx
from jaxtyping import Float

from coda_jax import arrays, weights
from coda_jax.discretization import codebooks, coding, transforms
from coda_jax.discretization.residual import fit_residual
from coda_jax.errors import UserError
from coda_jax.models.quantizer import QuantizerConfig, ResidualQuantizer
from coda_jax.models.transform_quantizer import TransformConfig, from_blocks

BLOCKS = (1, 2, 4)
METHODS = (*codebooks.METHODS, "coda")
_HELD_OUT = 8  # every so many images are for the comparison of transforms alone


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A quantizer and how good it is, on images that it was not fitted to.

  Attributes:
    config: its shape; parameters: by path within the quantizer.
    error, bound: weighed error of a block / that of its mean: reached, and the least that any code
      of Gaussian coordinates reaches at these bits.
    latent_error: squared error of the latents / their variance.
    compared: `error` by the side of the blocks, of all that were tried; "coda" has none.
  """

  config: TransformConfig | QuantizerConfig
  parameters: dict[str, np.ndarray]
  error: float
  bound: float
  latent_error: float
  compared: dict[int, float]


def fit(
  latents: Float[np.ndarray, "n h w c"],
  gradients: Float[np.ndarray, "m h w c"],
  *,
  bits: float,
  codes: int,
  method: str = "vq",
  block: int | None = None,
  patch_sizes: tuple[int, ...] = (),
) -> Fitted:
  """Finds a quantizer for scaled latents of at most `bits` an image.

  Args:
    latents: of the data.
    gradients: vector-Jacobian products of the decoder with white noise, at such latents.
    bits: of an image.
    codes: of a token, at most.
    method: one of `METHODS`.
    block: side of the blocks; None takes the best of `BLOCKS` that divide the latents.
    patch_sizes: of "coda", sides of the levels' grids; () takes the paper's for these latents.

  Raises:
    UserError: too few bits or data, or blocks that do not fit.
  """
  if len(latents) < 2:
    raise UserError("one image is too few: some are for the fit, others for the comparison")
  kept = np.arange(len(latents)) % _HELD_OUT != 1
  train, test = latents[kept], latents[~kept]
  if method == "coda":
    return _fit_coda(train, test, gradients, bits, codes, patch_sizes)
  side = latents.shape[1]
  blocks = [1] if method == "token-bridge" else [block] if block else BLOCKS
  blocks = [b for b in blocks if side % b == 0]
  if not blocks:
    raise UserError(f"latents of {side}x{side} cannot be cut into blocks of {block}x{block}")
  tried = [_fit(train, test, gradients, bits, codes, method, b) for b in blocks]
  best = min(tried, key=lambda f: f.error)
  compared = {b: f.error for b, f in zip(blocks, tried, strict=True)}
  return dataclasses.replace(best, compared=compared)


def _fit(train, test, gradients, bits: float, codes: int, method: str, block: int) -> Fitted:
  per_image = (train.shape[1] // block) ** 2
  budget = codebooks.Budget(bits / per_image, codes)
  if budget.bits < 1:
    raise UserError(f"--bits {bits:g} is less than 1 for each of {per_image} blocks of latents")
  transform = transforms.fit_transform(train, gradients, block)
  weighed = transform
  if method == "token-bridge":
    transform = transforms.plain_transform(train)
  x = transform.coordinates(train)
  levels = codebooks.METHODS[method](x, transform.variances, budget)
  order = [i for level in levels for factor in level for i in factor.coordinates]
  level_codes = tuple(math.prod(len(f.codes) for f in level) for level in levels)
  config = TransformConfig(
    codebook_size=sum(level_codes),
    patch_sizes=(train.shape[1] // block,) * len(levels),
    code_dim=len(transform.mean),
    level_codes=level_codes,
    factor_codes=tuple(len(f.codes) for level in levels for f in level),
    factor_dims=tuple(len(f.coordinates) for level in levels for f in level),
    block=block,
    lookup=method,
  )
  parameters = {
    "mean": transform.mean,
    "analysis": transform.analysis[:, order],
    "synthesis": transform.synthesis[order],
  }
  factors = (f for level in levels for f in level)
  parameters |= {f"codebooks.{i}": f.codes for i, f in enumerate(factors)}
  made = codebooks.quantized(transform.coordinates(test), levels) @ transform.synthesis
  made = from_blocks((made + transform.mean).reshape(*_grid(test, block), -1), block)
  return _measured(config, parameters, test, made, weighed)


def _fit_coda(train, test, gradients, bits: float, codes: int, patch_sizes) -> Fitted:
  config, parameters = fit_residual(
    train, gradients, bits=bits, codes=codes, patch_sizes=patch_sizes
  )
  make = lambda: ResidualQuantizer(config, rngs=nnx.Rngs(0))
  quantizer = weights.build(make, parameters, "the quantizer")
  made = np.asarray(arrays.jit_module(lambda q, x: q.decode(q.encode(x)))(quantizer)(test))
  block = max(b for b in BLOCKS if train.shape[1] % b == 0)
  weighed = transforms.fit_transform(train, gradients, block)
  return _measured(config, parameters, test, made, weighed)


def _measured(config, parameters, test, made, weighed: transforms.Transform) -> Fitted:
  """What `made` of `test` is worth."""
  error = test - made
  variance = np.square(weighed.coordinates(test)).sum()
  per_image = (test.shape[1] // weighed.block) ** 2
  least = coding.gaussian_error(weighed.variances, config.bits / per_image)
  return Fitted(
    config,
    parameters,
    error=float(np.square(weighed.differences(error)).sum() / variance),
    bound=least / float(weighed.variances.sum()),
    latent_error=float(np.square(error).sum() / np.square(test - test.mean((0, 1, 2))).sum()),
    compared={},
  )


def _grid(latents: np.ndarray, block: int) -> tuple[int, int, int]:
  n, h, w, _ = latents.shape
  return n, h // block, w // block
