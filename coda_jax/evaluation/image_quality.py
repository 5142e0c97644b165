"""Likeness of images. PSNR and SSIM as in the official code: 8-bit images, one by one, float64."""

from typing import Literal

import jax
import numpy as np
from flax import struct
from jaxtyping import Float, Float64, Int, UInt8

from coda_jax.errors import UserError
from coda_jax.evaluation.reconstruction import Batch

_RADIUS, _SIGMA = 5, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def to_uint8(
  images: Float[np.ndarray | jax.Array, "*b h w c"],
  rounding: Literal["truncate", "nearest"] = "truncate",
) -> UInt8[np.ndarray, "*b h w c"]:
  """8-bit images from [-1, 1], clipped. Official figures truncate; for files take `nearest`.

  Raises:
    UserError: NaN or infinity, which have no 8-bit value.
  """
  x = np.asarray(images, np.float32) * np.float32(0.5) + np.float32(0.5)
  if not np.isfinite(x).all():
    raise UserError("the model's images hold NaN or infinity: its weights or its dtype overflow")
  x = np.clip(x, 0, 1) * np.float32(255)
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


@struct.dataclass
class Quality:
  """Likeness of N reconstructions to their originals.

  Attributes:
    psnr: [N] in dB, ssim: [N], both of 8-bit images by the official definition. SSIM is NaN of
      images smaller than its window.
    lpips: [N] of float images, or None.
  """

  psnr: np.ndarray
  ssim: np.ndarray
  lpips: np.ndarray | None = None

  @classmethod
  def of(cls, batch: Batch) -> "Quality":
    images, ours, lpips = batch.images, to_uint8(batch.result.images), batch.result.lpips
    fits = min(images.shape[1:3]) >= 2 * _RADIUS + 1
    similarity = ssim(images, ours) if fits else np.full(len(images), np.nan)
    return cls(psnr(images, ours), similarity, None if lpips is None else np.asarray(lpips))

  def merge(self, other: "Quality") -> "Quality":
    return jax.tree.map(lambda a, b: np.concatenate([a, b]), self, other)

  def take(self, rows: Int[np.ndarray, "m"] | int | slice) -> "Quality":
    """Of some of the images."""
    return jax.tree.map(lambda x: x[rows], self)

  def summary(self) -> dict[str, float]:
    """Means over images by name; `lpips` only if it was measured."""
    found = {"psnr": self.psnr, "ssim": self.ssim, "lpips": self.lpips}
    return {name: float(np.mean(x)) for name, x in found.items() if x is not None}
