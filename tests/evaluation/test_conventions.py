"""Each convention against the tool's own arithmetic, written out or run."""

import jax
import numpy as np
import pytest
from PIL import Image

from coda_jax.errors import UserError
from coda_jax.evaluation.conventions import CONVENTIONS, convention


def pixels(*size, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (1, *size, 3), np.uint8)


def run(name, x):
  return np.asarray(jax.jit(convention(name).network_input)(x))[0]


def interpolated(x, place):
  """Bilinear interpolation of x [h, w, 3] at 299 x 299 places, one after the other.

  Places are float32, as the tools compute them; `scale` is the step between them.
  """
  h, w, _ = x.shape
  out = np.zeros((299, 299, 3))
  for i in range(299):
    y = place(i, np.float32(h / 299))
    top, dy = int(y), y - int(y)
    bottom = min(top + 1, h - 1)
    for j in range(299):
      z = place(j, np.float32(w / 299))
      left, dx = int(z), z - int(z)
      right = min(left + 1, w - 1)
      above = x[top, left] * (1 - dx) + x[top, right] * dx
      below = x[bottom, left] * (1 - dx) + x[bottom, right] * dx
      out[i, j] = above * (1 - dy) + below * dy
  return out


@pytest.mark.parametrize("size", [(40, 64), (320, 300)])
def test_pytorchs_resize(size):
  x = pixels(*size)
  half = np.float32(0.5)
  place = lambda i, scale: max((np.float32(i) + half) * scale - half, np.float32(0))
  expected = 2 * interpolated(x[0] / 255, place) - 1
  for name in ("coda", "pytorch-fid"):
    np.testing.assert_allclose(run(name, x), expected, atol=2e-6)
  as_float = (x / 255).astype(np.float32)
  np.testing.assert_allclose(run("coda", as_float), expected, atol=2e-6)


@pytest.mark.parametrize("size", [(40, 64), (320, 300)])
def test_tensorflow_1s_resize(size):
  x = pixels(*size)
  place = lambda i, scale: np.float32(i) * scale
  expected = (interpolated(x[0].astype(float), place) - 128) / 128
  for name in ("adm", "torch-fidelity"):
    np.testing.assert_allclose(run(name, x), expected, atol=2e-6)


@pytest.mark.parametrize("size", [(40, 64), (320, 512), (299, 299)])
def test_clean_fids_resize_is_pillows(size):
  x = pixels(*size)
  channels = [
    np.asarray(
      Image.fromarray(x[0, :, :, c].astype(np.float32)).resize((299, 299), Image.Resampling.BICUBIC)
    )
    for c in range(3)
  ]
  expected = (np.stack(channels, axis=-1).clip(0, 255) - 128) / 128
  np.testing.assert_allclose(run("clean-fid", x), expected, atol=1e-5)


def test_a_checkerboard_tells_them_apart():
  """Hand-made: columns of 0 and 255, 598 to 299, so that a place lies on or between columns."""
  x = np.zeros((1, 598, 598, 3), np.uint8)
  x[:, :, 1::2] = 255
  np.testing.assert_allclose(run("pytorch-fid", x)[9, 9], 0, atol=1e-6)  # between the two
  np.testing.assert_allclose(run("adm", x)[9, 9], -1, atol=1e-6)  # on the first
  np.testing.assert_allclose(run("clean-fid", x)[9, 9], -0.5 / 128, atol=1e-2)


def test_what_is_rounded():
  x = np.array([-1.5, -1.0, 0.0, 0.5, 1.0], np.float32).reshape(1, 1, 5, 1).repeat(3, axis=-1)
  bytes_ = {"truncate": [0, 0, 127, 191, 255], "nearest": [0, 0, 128, 191, 255]}
  roundings = {"pytorch-fid": "nearest", "torch-fidelity": "truncate", "adm": "truncate"}
  for name, rounding in {**roundings, "clean-fid": "nearest"}.items():
    found = convention(name).pixels(x)
    assert found.dtype == np.uint8 and found[0, 0, :, 0].tolist() == bytes_[rounding]
  floats = convention("coda").pixels(x)
  assert floats.dtype == np.float32
  np.testing.assert_allclose(floats[0, 0, :, 0], [0, 0, 0.5, 0.75, 1])
  assert convention("adm", "nearest").pixels(x)[0, 0, 2, 0] == 128
  with pytest.raises(UserError, match="NaN"):
    convention("coda").pixels(x * np.nan)


def test_bytes_and_floats_are_one_image():
  x = pixels(30, 30)
  for name in CONVENTIONS:
    as_float = (x / 255).astype(np.float32)
    np.testing.assert_allclose(run(name, x), run(name, as_float), atol=2e-5)


def test_names():
  with pytest.raises(UserError, match="unknown convention 'tf'; known are coda, pytorch-fid"):
    convention("tf")
  with pytest.raises(UserError, match="stay floats"):
    convention("coda", "nearest")
  assert convention("adm").describe()["input"] == "bytes, truncated"
