import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.evaluation.image_quality import psnr, ssim, to_uint8


@pytest.mark.parity("psnr_ssim")
def test_official_values(golden):
  out = golden.outputs()
  np.testing.assert_allclose(psnr(out["a"], out["b"]), out["psnr"], rtol=1e-12)
  np.testing.assert_allclose(ssim(out["a"], out["b"]), out["ssim"], rtol=1e-10)


def test_batch_is_per_image():
  rng = np.random.default_rng(0)
  a, b = rng.integers(0, 256, (2, 3, 16, 20, 3), dtype=np.uint8)
  for metric in (psnr, ssim):
    assert metric(a, b).shape == (3,)
    np.testing.assert_allclose(metric(a, b)[1], metric(a[1], b[1]))
  assert psnr(a, a).tolist() == [np.inf] * 3
  np.testing.assert_allclose(ssim(a, a), 1)


def test_ssim_is_the_mean_over_windows_written_out():
  """Direct form: weighted moments of every 11x11 window."""
  rng = np.random.default_rng(1)
  a, b = rng.integers(0, 256, (2, 13, 12, 1), dtype=np.uint8)
  g = np.exp(-np.square(np.arange(-5, 6)) / 4.5)
  w = np.outer(g, g) / np.outer(g, g).sum()
  values = []
  for i in range(3):
    for j in range(2):
      x, y = (im[i : i + 11, j : j + 11, 0].astype(float) for im in (a, b))
      mx, my = (w * x).sum(), (w * y).sum()
      vx, vy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum()
      cov = (w * (x - mx) * (y - my)).sum()
      c1, c2 = 2.55**2, 7.65**2
      values.append((2 * mx * my + c1) * (2 * cov + c2) / (mx**2 + my**2 + c1) / (vx + vy + c2))
  np.testing.assert_allclose(ssim(a, b), np.mean(values), rtol=1e-9)


def test_to_uint8_truncates_unless_told():
  x = np.array([-2.0, -1.0, 0.0, 1.0, 3.0], np.float32).reshape(1, 5, 1)
  assert to_uint8(x).ravel().tolist() == [0, 0, 127, 255, 255]
  assert to_uint8(x, "nearest").ravel().tolist() == [0, 0, 128, 255, 255]


def test_too_small_for_the_window():
  with pytest.raises(UserError, match="11x11"):
    ssim(np.zeros((10, 20, 3), np.uint8), np.zeros((10, 20, 3), np.uint8))
