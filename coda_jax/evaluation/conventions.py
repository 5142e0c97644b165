"""How images become the input of FID's Inception, by the tool that a figure is compared with.

Figures of two conventions are not comparable.

All of them take the covariance over N - 1 and the trace of its root by eigenvalues of a symmetric
product. pytorch-fid, ADM and clean-fid take scipy's general root instead, which agrees to about
1e-6 of FID where covariances have full rank; where it fails, they add 1e-6 to the diagonals.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from coda_jax.errors import UserError
from coda_jax.evaluation.image_quality import to_uint8
from coda_jax.models.inception import IMAGE_SIZE
from coda_jax.ops.resize import (
  bilinear_matrix,
  pillow_bicubic_matrix,
  separable,
  tf1_bilinear_matrix,
)

Rounding = Literal["truncate", "nearest"]


@dataclasses.dataclass(frozen=True)
class Convention:
  """From images to Inception's input.

  Attributes:
    name: as `--convention` takes it.
    rounding: how a model's float images become bytes; None: they stay floats, clamped.
    matrix: (from, to) -> [to, from], the resize of one axis to 299.
    resize: the same in words.
    unit: images are divided by 255 before the resize.
    normalise: (scale, offset) after the resize.
  """

  name: str
  rounding: Rounding | None
  matrix: Callable[[int, int], np.ndarray]
  resize: str
  unit: bool
  normalise: tuple[float, float]

  def pixels(
    self, images: Float[np.ndarray | jax.Array, "b h w 3"]
  ) -> UInt8[np.ndarray, "b h w 3"] | Float[np.ndarray, "b h w 3"]:
    """A model's images, about [-1, 1]: as bytes, or as float32 in [0, 1].

    Raises:
      UserError: NaN or infinity.
    """
    if self.rounding is not None:
      return to_uint8(images, self.rounding)
    x = np.asarray(images, np.float32) * np.float32(0.5) + np.float32(0.5)
    if not np.isfinite(x).all():
      raise UserError("the model's images hold NaN or infinity: its weights or its dtype overflow")
    return np.clip(x, 0, 1)

  def network_input(
    self, pixels: UInt8[Array | np.ndarray, "b h w 3"] | Float[Array | np.ndarray, "b h w 3"]
  ) -> Float[Array, "b 299 299 3"]:
    """Inception's input of bytes, or of floats in [0, 1]; runs under jit."""
    x = jnp.asarray(pixels).astype(jnp.float32)
    if pixels.dtype == np.uint8:
      x = x / 255 if self.unit else x
    elif not self.unit:
      x = x * 255
    height, width = x.shape[1:3]
    if (height, width) != (IMAGE_SIZE, IMAGE_SIZE):
      x = separable(x, self.matrix(height, IMAGE_SIZE), self.matrix(width, IMAGE_SIZE))
      x = jnp.clip(x, 0, 1 if self.unit else 255)  # bicubic alone goes beyond
    scale, offset = self.normalise
    return x * scale + offset

  def describe(self) -> dict[str, str]:
    """What was done, in words, for records."""
    scale, offset = self.normalise
    bytes_ = {"truncate": "bytes, truncated", "nearest": "bytes, rounded to the nearest"}
    return {
      "convention": self.name,
      "input": "floats in [0, 1], clamped" if self.rounding is None else bytes_[self.rounding],
      "resize": self.resize,
      "normalisation": "2 x - 1 of [0, 1]" if self.unit else "(x - 128) / 128 of [0, 255]",
    }


_PYTORCH = (
  bilinear_matrix,
  "bilinear to 299, half-pixel centres, not antialiased",
  True,
  (2.0, -1.0),
)
_TF1 = (tf1_bilinear_matrix, "bilinear to 299 as TensorFlow 1", False, (1 / 128, -1.0))
_PILLOW = (
  pillow_bicubic_matrix,
  "Pillow's bicubic to 299, antialiased, clipped",
  False,
  (1 / 128, -1.0),
)

# Bytes are made as the tool's users make them: image files round, the scripts of ADM and of
# torch-fidelity truncate.
CONVENTIONS = {
  c.name: c
  for c in (
    Convention("coda", None, *_PYTORCH),  # the official CODA code
    Convention("pytorch-fid", "nearest", *_PYTORCH),
    Convention("torch-fidelity", "truncate", *_TF1),
    Convention("adm", "truncate", *_TF1),
    Convention("clean-fid", "nearest", *_PILLOW),
  )
}


def convention(name: str, rounding: Rounding | None = None) -> Convention:
  """The convention of a name, with another rounding if one is given.

  Raises:
    UserError: an unknown name, or a rounding where images stay floats.
  """
  if name not in CONVENTIONS:
    raise UserError(f"unknown convention {name!r}; known are {', '.join(CONVENTIONS)}")
  found = CONVENTIONS[name]
  if rounding is None:
    return found
  if found.rounding is None:
    raise UserError(f"convention {name!r} does not round: its images stay floats")
  return dataclasses.replace(found, rounding=rounding)
