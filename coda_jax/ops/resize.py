"""Resizes as PyTorch, TensorFlow 1 and Pillow compute them, written as small matmuls.

They are linear and separable, so each axis is one constant matrix. `jax.image` has no adaptive
average pooling, and its bicubic has another coefficient than PyTorch's (a = -0.5) and renormalises
at the border instead of clamping.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_A = -0.75  # PyTorch's bicubic coefficient


@functools.cache
def area_matrix(n: int, p: int) -> np.ndarray:
  """[p, n] float32: adaptive average pooling, bin i covers floor(i*n/p) to ceil((i+1)*n/p).

  Source: torch `interpolate(mode="area")`, which is `adaptive_avg_pool2d`.
  """
  m = np.zeros((p, n))
  for i in range(p):
    start, stop = i * n // p, -(-(i + 1) * n // p)
    m[i, start:stop] = 1 / (stop - start)
  return m.astype(np.float32)


def _cubic(t: np.ndarray, a: float = _A) -> np.ndarray:
  """Keys' cubic convolution kernel at distance `t`, up to 2."""
  near = ((a + 2) * t - (a + 3)) * t * t + 1
  far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
  return np.where(t <= 1, near, far)


@functools.cache
def bicubic_matrix(p: int, n: int) -> np.ndarray:
  """[n, p] float32: bicubic interpolation from p to n samples, half-pixel centres, clamped border.

  Source: torch `interpolate(mode="bicubic", align_corners=False)`, no antialiasing. In float32
  throughout, as there: at 64 to 224 a more exact matrix is 6e-6 from torch's.
  """
  centre = np.float32(p / n) * (np.arange(n, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
  first = np.floor(centre)
  t = centre - first
  taps = np.stack([t + 1, t, 1 - t, (1 - t) + 1], axis=1)
  m = np.zeros((n, p), np.float32)
  columns = np.clip(first[:, None] + np.arange(-1, 3), 0, p - 1).astype(int)
  np.add.at(m, (np.arange(n)[:, None], columns), _cubic(taps))
  return m


@functools.cache
def bilinear_matrix(p: int, n: int) -> np.ndarray:
  """[n, p] float32: bilinear interpolation from p to n samples, half-pixel centres, no smoothing.

  Source: torch `interpolate(mode="bilinear", align_corners=False)`, in float32 as there.
  """
  half = np.float32(0.5)
  centre = np.float32(p / n) * (np.arange(n, dtype=np.float32) + half) - half
  return _between(np.maximum(centre, np.float32(0)), p)


@functools.cache
def tf1_bilinear_matrix(p: int, n: int) -> np.ndarray:
  """[n, p] float32: bilinear interpolation from p to n samples where sample i lies at i * p / n.

  Source: TensorFlow 1's `ResizeBilinear` without `align_corners`, in float32 as there.
  """
  return _between(np.arange(n, dtype=np.float32) * np.float32(p / n), p)


def _between(centre: np.ndarray, p: int) -> np.ndarray:
  """[n, p]: linear interpolation of p samples at n places; behind the last it is repeated."""
  n = np.arange(len(centre))
  first = np.minimum(np.floor(centre).astype(int), p - 1)
  t = centre - first.astype(np.float32)
  m = np.zeros((len(centre), p), np.float32)
  np.add.at(m, (n, first), 1 - t)
  np.add.at(m, (n, np.minimum(first + 1, p - 1)), t)
  return m


@functools.cache
def pillow_bicubic_matrix(p: int, n: int) -> np.ndarray:
  """[n, p] float32: bicubic interpolation (a = -0.5) from p to n samples, antialiased.

  Source: Pillow's `Image.resize(resample=BICUBIC)` of a float image (mode "F"). A smaller image
  widens the kernel by p / n; weights outside of the image are left out and the rest sums to 1.
  """
  width = max(p / n, 1.0)
  centre = (np.arange(n) + 0.5) * (p / n)
  at = np.arange(p) + 0.5
  first = np.maximum(np.floor(centre - 2 * width + 0.5), 0)[:, None]
  last = np.minimum(np.floor(centre + 2 * width + 0.5), p)[:, None]
  distance = np.abs(at - centre[:, None]) / width
  m = np.where(distance < 2, _cubic(distance, -0.5), 0.0)
  m = np.where((np.arange(p) >= first) & (np.arange(p) < last), m, 0.0)
  return (m / m.sum(axis=1, keepdims=True)).astype(np.float32)


def separable(x: Float[Array, "b h w c"], rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  """Images [B, p, q, C] of images [B, H, W, C], with matrices [p, H] and [q, W]."""
  exact = jax.lax.Precision.HIGHEST
  x = jnp.einsum("ph,bhwc->bpwc", rows.astype(x.dtype), x, precision=exact)
  return jnp.einsum("qw,bpwc->bpqc", columns.astype(x.dtype), x, precision=exact)


def area_resize(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b p q c"]:
  """Adaptive average pooling to `size`."""
  if x.shape[1:3] == tuple(size):
    return x
  return separable(x, area_matrix(x.shape[1], size[0]), area_matrix(x.shape[2], size[1]))


def bicubic_resize(x: Float[Array, "b p q c"], size: tuple[int, int]) -> Float[Array, "b h w c"]:
  """PyTorch's bicubic interpolation to `size`."""
  if x.shape[1:3] == tuple(size):
    return x
  return separable(x, bicubic_matrix(x.shape[1], size[0]), bicubic_matrix(x.shape[2], size[1]))
