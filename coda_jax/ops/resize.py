"""Area pooling and bicubic interpolation as PyTorch computes them, written as small matmuls.

Both resizes are linear and separable, so each axis is one constant matrix. `jax.image` has no
adaptive average pooling, and its bicubic has another coefficient (a = -0.5) and renormalises at
the border instead of clamping.
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


def _cubic(t: np.ndarray) -> np.ndarray:
  """Keys' cubic convolution kernel at distance `t`."""
  near = ((_A + 2) * t - (_A + 3)) * t * t + 1
  far = ((_A * t - 5 * _A) * t + 8 * _A) * t - 4 * _A
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


def _separable(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  exact = jax.lax.Precision.HIGHEST
  x = jnp.einsum("ph,bhwc->bpwc", rows.astype(x.dtype), x, precision=exact)
  return jnp.einsum("qw,bpwc->bpqc", columns.astype(x.dtype), x, precision=exact)


def area_resize(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b p q c"]:
  """Adaptive average pooling to `size`."""
  if x.shape[1:3] == tuple(size):
    return x
  return _separable(x, area_matrix(x.shape[1], size[0]), area_matrix(x.shape[2], size[1]))


def bicubic_resize(x: Float[Array, "b p q c"], size: tuple[int, int]) -> Float[Array, "b h w c"]:
  """PyTorch's bicubic interpolation to `size`."""
  if x.shape[1:3] == tuple(size):
    return x
  return _separable(x, bicubic_matrix(x.shape[1], size[0]), bicubic_matrix(x.shape[2], size[1]))
