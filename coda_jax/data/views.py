"""Which crops of an image are tokenized."""

import dataclasses

import numpy as np

from coda_jax.data import decode, rng, sources


@dataclasses.dataclass(frozen=True)
class Views:
  """The crops of every image: the centre's, unless others are asked for.

  Attributes:
    image_size: edge of a crop in pixels.
    resize_ratio: the shorter edge is first brought to this times image_size.
    ten_crop: the corners and the centre, each mirrored too.
    random_crops: as many at random places, by `seed`.
    flip: every crop mirrored too.
  """

  image_size: int
  resize_ratio: float
  ten_crop: bool
  random_crops: int
  flip: bool
  seed: int

  def _all(self) -> list[tuple[str, bool]]:
    """(place, mirrored) of every crop; the places: a corner, "centre" or "random"."""
    if self.ten_crop:
      places = ["top left", "top right", "bottom left", "bottom right", "centre"]
    else:
      places = ["random"] * self.random_crops or ["centre"]
    mirrored = (False, True) if self.flip or self.ten_crop else (False,)
    return [(place, flip) for place in places for flip in mirrored]

  def __len__(self) -> int:
    return len(self._all())

  def of(self, source: sources.ImageSource, row: int) -> tuple[list[np.ndarray] | str, int]:
    """(the crops uint8 [size, size, 3], label), or (why there are none, -1)."""
    size = self.image_size
    try:
      data, label = source[row]
      image = decode.decode_image(data)
      crops = []
      for i, (place, flip) in enumerate(self._all()):
        position = None
        if place == "random":  # a mirrored crop is that of its own random numbers
          position = tuple(rng.words(self.seed, rng.Stream.TOKEN_CROP, row, i)[:2])
        elif place != "centre":
          shorter = max(size, round(self.resize_ratio * size))
          width, height = decode.resized_size(image.size, shorter)
          position = (
            0 if place.startswith("top") else height - size,
            0 if place.endswith("left") else width - size,
          )
        options = {"resize_ratio": self.resize_ratio, "position": position, "flip": flip}
        crops.append(decode.resize_and_crop(image, size, **options))
      return crops, label
    except (decode.UnreadableImage, OSError) as e:
      return str(e), -1
