"""Small image folders for the data tests."""

import io
import pathlib

import numpy as np
from PIL import Image


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
  """A smooth uint8 [height, width, 3] image, different for every seed and asymmetric."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[0:height, 0:width] / 16
  phase, tilt = rng.uniform(0, 6, 3), rng.uniform(0.5, 2, 3)
  waves = np.sin(x[..., None] * tilt + phase) + np.cos(y[..., None] + phase * tilt)
  return (127.5 + 60 * waves).astype(np.uint8)


def encode(image: np.ndarray | Image.Image, form: str = "png", **options) -> bytes:
  image = image if isinstance(image, Image.Image) else Image.fromarray(image)
  buffer = io.BytesIO()
  image.save(buffer, form, **options)
  return buffer.getvalue()


def write_folder(
  root: pathlib.Path, count: int, classes: str = "ab", size=(40, 52)
) -> pathlib.Path:
  """`count` PNGs dealt to class folders root/a, root/b, ...; image i is photo(seed=i)."""
  for i in range(count):
    folder = root / classes[i % len(classes)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{i:03}.png").write_bytes(encode(photo(*size, seed=i)))
  return root
