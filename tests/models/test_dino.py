import jax
import jax.numpy as jnp
import numpy as np

from coda_jax.models.dino import DINO, MEAN, STD, dino_input
from coda_jax.ops.resize import area_resize, bicubic_resize


def normalised(x):
  return (np.asarray(x) * 0.5 + 0.5 - MEAN) / STD


def test_resize_follows_the_height():
  rng = np.random.default_rng(0)
  for size, resize in (((240, 256), area_resize), ((64, 96), bicubic_resize)):
    x = rng.uniform(-1, 1, (1, *size, 3)).astype(np.float32)
    expected = resize(jnp.asarray(normalised(x)), (224, 224))
    np.testing.assert_allclose(dino_input(jnp.asarray(x)), expected, atol=1e-5)
  x = rng.uniform(-1, 1, (1, 224, 224, 3)).astype(np.float32)
  np.testing.assert_allclose(
    dino_input(jnp.asarray(x), jax.random.key(0)), normalised(x), atol=1e-5
  )


def test_half_of_the_calls_take_one_window_for_the_whole_batch():
  # Pixel values tell where they come from.
  h, w = 240, 231
  rows, columns = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
  x = np.stack([rows, columns, rows], -1)[None].astype(np.float32) / 128 - 1
  x = jnp.asarray(np.concatenate([x, x * 0.5]))
  crop = jax.jit(dino_input)
  windows = set()
  area = np.asarray(dino_input(x))
  n = 40
  for i in range(n):
    y = np.asarray(crop(x, jax.random.key(i)))
    if np.allclose(y, area, atol=1e-4):
      continue
    top, left = (np.rint((y[0, 0, 0, c] * STD[c] + MEAN[c]) * 256) for c in (0, 1))
    top, left = int(top), int(left)
    expected = normalised(np.asarray(x)[:, top : top + 224, left : left + 224])
    np.testing.assert_allclose(y, expected, atol=1e-4)
    windows.add((top, left))
  assert 0.3 * n < len(windows) < 0.7 * n
  assert len({t for t, _ in windows}) > 8 and len({left for _, left in windows}) > 4
  assert max(t for t, _ in windows) <= h - 224 and max(left for _, left in windows) <= w - 224


def test_no_window_unless_both_sides_allow_one():
  x = jax.random.uniform(jax.random.key(0), (1, 260, 224, 3))
  for i in range(4):
    np.testing.assert_array_equal(dino_input(x, jax.random.key(i)), dino_input(x))


def test_readouts_keep_float32_under_bfloat16_compute():
  readouts = jax.eval_shape(
    lambda x: DINO(dtype=jnp.bfloat16)(x), jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
  )
  assert [(r.shape, r.dtype) for r in readouts] == [((2, 196, 384), jnp.float32)] * 5
