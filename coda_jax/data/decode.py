"""Encoded image bytes to a uint8 RGB crop, on the host with Pillow alone.

The geometry is torchvision's `Resize(shorter edge)` + `RandomCrop` / `CenterCrop` on PIL images,
which the official data code uses, to the pixel. `Image.draft` (JPEG decoding at 1/2, 1/4, 1/8) is
not used: it changes pixels, and does nothing for images as small as ImageNet's.
"""

import io
import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from coda_jax.data.metadata import without_metadata

_ORIENTATIONS = {  # EXIF tag 0x0112 -> what brings the image upright
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


class UnreadableImage(Exception):
  """These bytes are no image that can be shown as 8-bit RGB; the message says why."""


def _orientation(image: Image.Image) -> int:
  try:
    return image.getexif().get(0x0112, 1)
  except Exception:  # broken metadata do not spoil the pixels
    return 1


def to_rgb(image: Image.Image) -> Image.Image:
  """8-bit RGB of a loaded image; see `decode_image`."""
  if image.mode == "I" or image.mode.startswith("I;16"):
    # Pillow clips these at 255 or drops bits, depending on its version.
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
      raise UnreadableImage("32-bit integers, whose range is unknown")
    return Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
  if image.mode == "F":
    raise UnreadableImage("floating-point values, whose range is unknown")
  if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")
  return image.convert("RGB")


def decode_image(data: bytes) -> Image.Image:
  """The image as 8-bit RGB, upright.

  CMYK, palette and grey images are converted, 16-bit grey is scaled by 1/257, transparency is laid
  over white (as a browser shows it), the EXIF orientation is applied, of an animation the first
  frame is taken. Metadata that Pillow refuses are left out.

  Raises:
    UnreadableImage: corrupt, truncated, not an image, or without a defined 8-bit range.
  """
  try:
    return _decode(data)
  except UnreadableImage:
    bare = without_metadata(data)
    if bare == data:
      raise
    return _decode(bare)


def _decode(data: bytes) -> Image.Image:
  try:
    image = Image.open(io.BytesIO(data))
    image.load()
    upright = _ORIENTATIONS.get(_orientation(image))
    image = to_rgb(image)
  except UnreadableImage:
    raise
  except UnidentifiedImageError as e:
    raise UnreadableImage("not an image of a known format") from e
  except Exception as e:  # Pillow raises a dozen types on corrupt files
    raise UnreadableImage(str(e).replace("\n", " ") or type(e).__name__) from e
  return image if upright is None else image.transpose(upright)


def resized_size(size: tuple[int, int], shorter: int) -> tuple[int, int]:
  """(width, height) with the shorter edge `shorter`, the longer floor(shorter * long / short).

  Raises:
    UnreadableImage: the result would exceed Pillow's limit for one image.
  """
  w, h = size
  long = int(shorter * max(w, h) / min(w, h))
  if Image.MAX_IMAGE_PIXELS and shorter * long > Image.MAX_IMAGE_PIXELS:
    raise UnreadableImage(f"{w} x {h} pixels: too elongated to resize")
  return (shorter, long) if w <= h else (long, shorter)


def _resized_window(
  image: Image.Image, size: tuple[int, int], left: int, top: int, edge: int
) -> Image.Image:
  """`image.resize(size, LANCZOS).crop((left, top, left + edge, top + edge))`, to the bit.

  About a fifth cheaper: Pillow resamples along the rows and then along the columns, so the first
  pass needs only the rows that the window's columns will look at, and the second only the window's
  columns. (Its `box` argument would save more, but rounds differently.)
  """
  (w, h), (new_w, new_h) = image.size, size
  scale = h / new_h
  reach = 3 * max(1, scale)  # Lanczos sees three pixels of the coarser grid on each side
  first = max(0, math.floor(top * scale - reach))
  last = min(h, math.ceil((top + edge) * scale + reach))
  rows = image.crop((0, first, w, last)).resize((new_w, last - first), Image.Resampling.LANCZOS)
  columns = Image.new("RGB", (edge, h))
  columns.paste(rows.crop((left, 0, left + edge, last - first)), (0, first))
  columns = columns.resize((edge, new_h), Image.Resampling.LANCZOS)
  return columns.crop((0, top, edge, top + edge))


def resize_and_crop(
  image: Image.Image,
  image_size: int,
  *,
  resize_ratio: float | None,
  position: tuple[int, int] | None = None,
  flip: bool = False,
) -> UInt8[np.ndarray, "{image_size} {image_size} 3"]:
  """A square crop of `image` (RGB) after a Lanczos resize.

  Args:
    image_size: edge of the crop in pixels.
    resize_ratio: the shorter edge is first brought to round(resize_ratio * image_size), at least
      image_size. With None the image keeps its size, unless it is too small for the crop: then its
      shorter edge is brought to image_size.
    position: two non-negative random integers, reduced modulo the number of rows and columns where
      the crop may start; None for the centre.
    flip: mirrors left and right.

  Raises:
    UnreadableImage: the resized image would exceed Pillow's limit for one image.
  """
  size = image.size
  if resize_ratio is not None:
    size = resized_size(size, max(image_size, round(resize_ratio * image_size)))
  elif min(size) < image_size:
    size = resized_size(size, image_size)
  columns, rows = size[0] - image_size, size[1] - image_size
  if position is None:
    top, left = round(rows / 2), round(columns / 2)
  else:
    top, left = position[0] % (rows + 1), position[1] % (columns + 1)
  if size == image.size:
    window = image.crop((left, top, left + image_size, top + image_size))
  else:
    window = _resized_window(image, size, left, top, image_size)
  pixels = np.asarray(window)
  return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels
