"""Images of any size for a VAE: as they are, cropped to its stride, or all brought to one size."""

import collections
import dataclasses
import io
import itertools
import logging
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from coda_jax import storage
from coda_jax.data import decode, metadata, sources
from coda_jax.errors import UserError

log = logging.getLogger("coda_jax")


def open_images(path: str) -> tuple[list[str], Callable[[int], bytes]]:
  """Names of the images of a file, a folder or a data spec, and what reads one of them.

  Raises:
    UserError: there is nothing at `path`, or the spec cannot be opened.
  """
  file = storage.path(path)
  if file.is_file():
    return [file.name], lambda _: file.read_bytes()
  path = str(file)
  if not os.path.isdir(path) and not (":" in path or "@" in path):
    raise UserError(f"{path}: no such image file or folder")
  source = sources.open_source(f"folder:{path}" if os.path.isdir(path) else path)
  if isinstance(source, sources.FolderSource):
    names = [os.path.relpath(source.name(i), source.root) for i in range(len(source))]
  else:
    names = [f"{i:06d}" for i in range(len(source))]
  return names, lambda i: source[i][0]


def file_names(names: list[str]) -> list[str]:
  """`a/b.jpg` -> `a/b.png`, all different, also where upper and lower case are one.

  Images that differ by their extension alone keep it; a number follows where that is not enough. No
  file has the name of a folder of another.
  """
  stems = [os.path.splitext(n)[0] for n in names]
  count = collections.Counter(s.lower() for s in stems)
  taken = {str(p).lower() for n in names for p in pathlib.PurePath(n).parents}
  out = []
  for name, stem in zip(names, stems, strict=True):
    base = stem if count[stem.lower()] == 1 else name
    tries = (f"{base}_{i}.png" if i > 1 else f"{base}.png" for i in itertools.count(1))
    out.append(next(t for t in tries if t.lower() not in taken))
    taken.add(out[-1].lower())
  return out


@dataclasses.dataclass(frozen=True)
class WholeImages:
  """Named images and the size that each is brought to.

  Attributes:
    path: where they come from, for messages.
    names: of the images.
    read: the encoded bytes of one, by its index.
    stride: of the VAE; it must divide both sides.
    image_size: brings the shorter edge to this and takes the centre square; None keeps the size.
    crop: crops around the centre to the nearest size that the stride divides.
  """

  path: str
  names: list[str]
  read: Callable[[int], bytes]
  stride: int
  image_size: int | None = None
  crop: bool = False

  def _fitted(self, size: tuple[int, int]) -> tuple[int, int]:
    """Width and height that an image of `size` is brought to."""
    if self.image_size:
      return self.image_size, self.image_size
    width, height = (n // self.stride * self.stride if self.crop else n for n in size)
    return width, height

  def sizes(self) -> list[tuple[int, int]]:
    """Widths and heights that images are brought to, each once.

    Raises:
      UserError: one of them does not fit the stride.
    """
    found = set()
    for i, name in enumerate(self.names):
      try:
        header = metadata.without_metadata(self.read(i))
        size = Image.open(io.BytesIO(header)).size  # decodes no pixels
      except Exception:  # reported when it is decoded
        continue
      fitted = self._fitted(size)
      if not all(fitted) or any(n % self.stride for n in fitted):
        what = "is smaller than" if self.crop else "is not a multiple of"
        hint = (
          "" if self.crop else "; --crop takes the nearest smaller size, --image-size N another"
        )
        raise UserError(
          f"{name}: its size of {size[0]} x {size[1]} pixels {what} the VAE's stride "
          f"{self.stride}{hint}"
        )
      found.add(fitted)
    return sorted(found)

  def batches(self, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """{"image": uint8 [B, H, W, 3], "valid": bool [B], "index": int [B]}, each of one size.

    Every size is compiled once: the last batch of a size is padded to those before it. An image
    that cannot be read is left out with a warning.

    Raises:
      UserError: the only image cannot be read.
    """
    waiting: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    full = set()

    def batch(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
      indices, images = zip(*waiting.pop(shape), strict=True)
      rows = np.arange(batch_size if shape in full else len(images))
      last = len(images) - 1
      padded = np.minimum(rows, last)
      return {
        "image": np.stack(images)[padded],
        "valid": rows <= last,
        "index": np.asarray(indices)[padded],
      }

    for i, name in enumerate(self.names):
      try:
        image = self._image(i)
      except (decode.UnreadableImage, OSError) as e:
        if len(self.names) == 1:
          raise UserError(f"{self.path} cannot be read: {e}") from e
        log.warning("unreadable image %s (%s): left out", name, e)
        continue
      waiting.setdefault(image.shape, []).append((i, image))
      if len(waiting[image.shape]) == batch_size:
        full.add(image.shape)
        yield batch(image.shape)
    for shape in list(waiting):
      yield batch(shape)

  def _image(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
    image = decode.decode_image(self.read(index))
    if self.image_size:
      return decode.resize_and_crop(image, self.image_size, resize_ratio=1.0)
    width, height = self._fitted(image.size)
    pixels = np.asarray(image)
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
