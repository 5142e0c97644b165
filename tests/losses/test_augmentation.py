import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.losses.augmentation import _augment, diff_augment, fade_blur


def reference(x, act, u, cutout):
  """The same in loops, from the published description."""
  x = x.astype(np.float64).copy()
  b, h, w, _ = x.shape
  for i in range(b):
    if act[0]:
      dh, dw = (
        int(np.floor(r * (2 * round(n / 8) + 1))) - round(n / 8)
        for r, n in ((u[0, i], h), (u[1, i], w))
      )
      moved = np.zeros_like(x[i])
      for p in range(h):
        for q in range(w):
          if 0 <= p + dh < h and 0 <= q + dw < w:
            moved[p, q] = x[i, p + dh, q + dw]
      x[i] = moved
    if act[1]:
      x[i] += u[2, i] - 0.5
      grey = x[i].mean(-1, keepdims=True)
      x[i] = grey + (x[i] - grey) * 2 * u[3, i]
      x[i] = x[i].mean() + (x[i] - x[i].mean()) * (u[4, i] + 0.5)
    if act[2]:
      hit = []
      for r, n in ((u[5, i], h), (u[6, i], w)):
        side = round(n * cutout)
        first = int(np.floor(r * (n + 1 - side % 2))) - side // 2
        hit.append(sorted({min(max(j, 0), n - 1) for j in range(first, first + side)}))
      x[i][np.ix_(*hit)] = 0
  return x


@pytest.mark.parametrize("act", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)])
def test_each_part_acts_as_described(act):
  rng = np.random.default_rng(0)
  x = rng.uniform(-1, 1, (6, 24, 18, 3)).astype(np.float32)
  u = rng.random((7, 6)).astype(np.float32)
  u[:, 0], u[:, 1] = 0, 0.999999
  y = jax.jit(_augment, static_argnums=3)(x, jnp.array(act, bool), u, 0.3)
  np.testing.assert_allclose(y, reference(x, act, u, 0.3), atol=1e-5)


def test_probability_decides_for_the_batch():
  x = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3))
  augment = jax.jit(diff_augment)
  np.testing.assert_allclose(augment(x, jax.random.key(1), probability=0.0), x, atol=1e-6)
  first, second = (augment(x, jax.random.key(i), probability=1.0) for i in (1, 2))
  assert not np.allclose(first, x, atol=0.1) and not np.allclose(first, second, atol=0.1)


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.2])
def test_blur_is_a_mirrored_convolution(strength):
  x = np.random.default_rng(0).uniform(-1, 1, (1, 32, 28, 3)).astype(np.float32)
  sigma = strength * 4
  radius = int(3 * sigma)
  window = 2.0 ** -np.square(np.arange(-radius, radius + 1) / sigma)
  window /= window.sum()
  padded = np.pad(x[0].astype(np.float64), ((radius,) * 2, (radius,) * 2, (0, 0)), mode="reflect")
  for axis in (0, 1):
    padded = np.apply_along_axis(np.convolve, axis, padded, window, mode="valid")
  np.testing.assert_allclose(jax.jit(fade_blur)(x, strength)[0], padded, atol=1e-5)


def test_no_blur_at_the_end():
  x = jax.random.uniform(jax.random.key(0), (1, 32, 32, 3))
  np.testing.assert_allclose(jax.jit(fade_blur)(x, 0.0), x, atol=1e-6)


def test_blur_needs_room_to_mirror():
  with pytest.raises(UserError, match="reaches 33 pixels"):
    fade_blur(jnp.zeros((1, 256, 32, 3)), 1.0)
