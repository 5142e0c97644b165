"""PSNR and SSIM as the official code defines them: of 8-bit images, one by one, in float64."""

from typing import Literal

import numpy as np
from jaxtyping import Float, Float64, UInt8

from coda_jax.errors import UserError

_RADIUS, _SIGMA = 5, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def to_uint8(
  images: Float[np.ndarray, "*b h w c"], rounding: Literal["truncate", "nearest"] = "truncate"
) -> UInt8[np.ndarray, "*b h w c"]:
  """8-bit images from [-1, 1], clipped. Official figures truncate; for files take `nearest`."""
  x = np.clip(images.astype(np.float32) * np.float32(0.5) + np.float32(0.5), 0, 1) * np.float32(255)
  return (np.rint(x) if rounding == "nearest" else x).astype(np.uint8)


def psnr(
  a: UInt8[np.ndarray, "*b h w c"], b: UInt8[np.ndarray, "*b h w c"]
) -> Float64[np.ndarray, "*b"]:
  """Peak signal-to-noise ratio of each image in dB; infinite where the images are equal."""
  mse = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)), axis=(-3, -2, -1))
  with np.errstate(divide="ignore"):
    return np.asarray(10 * np.log10(255.0**2 / mse))


def ssim(
  a: UInt8[np.ndarray, "*b h w c"], b: UInt8[np.ndarray, "*b h w c"]
) -> Float64[np.ndarray, "*b"]:
  """Structural similarity of each image (Wang et al. 2004), averaged over its channels.

  11x11 Gaussian window of sigma 1.5, positions where it fits alone. Raises UserError for images
  smaller than the window.
  """
  if min(a.shape[-3:-1]) < 2 * _RADIUS + 1:
    raise UserError(f"SSIM needs images of at least 11x11, got {a.shape[-3:-1]}")
  pairs = zip(a.reshape(-1, *a.shape[-3:]), b.reshape(-1, *b.shape[-3:]), strict=True)
  # One image at a time: its maps stay in the processor's cache.
  values = [_ssim(x.astype(np.float64), y.astype(np.float64)) for x, y in pairs]
  return np.asarray(values, np.float64).reshape(a.shape[:-3])


def _ssim(x: np.ndarray, y: np.ndarray) -> float:
  mx, my = _blur(x), _blur(y)
  xx, yy, xy = mx * mx, my * my, mx * my
  vx, vy, cov = _blur(x * x) - xx, _blur(y * y) - yy, _blur(x * y) - xy
  similarity = ((2 * xy + _C1) * (2 * cov + _C2)) / ((xx + yy + _C1) * (vx + vy + _C2))
  return similarity.mean()


def _blur(x: np.ndarray) -> np.ndarray:
  """Gaussian of radius 5 over the first two axes of [h, w, c], the valid region."""
  window = np.exp(-np.square(np.arange(-_RADIUS, _RADIUS + 1)) / (2 * _SIGMA**2))
  window /= window.sum()
  for axis in (0, 1):
    n = x.shape[axis] - 2 * _RADIUS
    parts = [x[(slice(None),) * axis + (slice(i, i + n),)] for i in range(2 * _RADIUS + 1)]
    x = window[_RADIUS] * parts[_RADIUS]
    for i in range(_RADIUS):  # the window is symmetric
      x += window[i] * (parts[i] + parts[-1 - i])
  return x
