"""Checks of what users hand to models: shapes and types always, values where they are known.

Values are not known while a function is traced; the check of values then does nothing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from coda_jax.errors import UserError

# Reconstructions, which may be encoded again, leave [-1, 1] a little; bytes reach 255.
_LARGEST_PIXEL = 8.0


def check_images(images, what: str = "images") -> None:
  """Checks a batch of images, floats [B, H, W, 3] in [-1, 1].

  Raises:
    UserError: another layout or type, no images, or values that are no such pixels.
  """
  shape = getattr(images, "shape", None)
  if shape is None:
    raise UserError(f"{what}: a {type(images).__name__} was given; an array [B, H, W, 3] is needed")
  hint = ""
  if len(shape) == 3:
    hint = "; one image is x[None]"
  elif len(shape) == 4 and shape[3] != 3 and shape[1] == 3:
    hint = "; NCHW becomes NHWC by x.transpose(0, 2, 3, 1)"
  elif len(shape) == 4 and shape[3] == 4:
    hint = "; of RGBA, blend the alpha or take x[..., :3]"
  if len(shape) != 4 or shape[3] != 3:
    raise UserError(f"{what} have shape {list(shape)}, not [B, H, W, 3]{hint}")
  if not all(shape):
    raise UserError(f"{what} have shape {list(shape)}: there are none")
  if not jnp.issubdtype(images.dtype, jnp.floating):
    hint = "; bytes become x / 127.5 - 1" if images.dtype == np.uint8 else ""
    raise UserError(f"{what} are {images.dtype}, not floats in [-1, 1]{hint}")
  if _known(images):
    largest = _largest(images)
    if not np.isfinite(largest):
      raise UserError(f"{what} hold NaN or infinity")
    if largest > _LARGEST_PIXEL:
      raise UserError(f"{what} have values up to {largest:g}, not in [-1, 1]; bytes: x / 127.5 - 1")


def check_ids(ids, ranges: Sequence[tuple[int, int]]) -> None:
  """Checks ids of the first levels, integers [B, ph, pw].

  Args:
    ids: of each level.
    ranges: the first id of each level, and the one behind its last.

  Raises:
    UserError: no levels, another layout or type, no images, or an id that is out of range.
  """
  if not isinstance(ids, (list, tuple)):
    raise UserError(
      f"ids: a {type(ids).__name__} was given; a list with an array a level is needed"
    )
  batches = set()
  for level, x in enumerate(ids, 1):
    shape, dtype = getattr(x, "shape", None), getattr(x, "dtype", np.float32)
    if shape is None or len(shape) != 3 or not jnp.issubdtype(dtype, jnp.integer):
      given = type(x).__name__ if shape is None else f"{dtype} {list(shape)}"
      raise UserError(f"ids of level {level} are {given}, not integers [B, ph, pw]")
    batches.add(shape[0])
    if not all(shape):
      raise UserError(f"ids of level {level} have shape {list(shape)}: there are none")
    if _known(x):
      with jax.ensure_compile_time_eval():
        low, high = int(x.min()), int(x.max())
      first, end = ranges[min(level, len(ranges)) - 1]
      if low < first or high >= end:
        raise UserError(
          f"ids of level {level} go from {low} to {high}; the codebook has {first} to {end - 1}"
        )
  if len(batches) > 1:
    raise UserError(f"ids of {sorted(batches)} images at different levels")


def check_latents(latents, channels: int, what: str = "latents") -> None:
  """Checks a batch of latents, floats [B, h, w, channels]. Raises UserError."""
  shape, dtype = getattr(latents, "shape", None), getattr(latents, "dtype", np.float32)
  if shape is None or len(shape) != 4 or shape[3] != channels or not all(shape):
    given = type(latents).__name__ if shape is None else f"of shape {list(shape)}"
    raise UserError(f"{what} are {given}, not [B, h, w, {channels}]")
  if not jnp.issubdtype(dtype, jnp.floating):
    raise UserError(f"{what} are {dtype}, not floats")
  if _known(latents) and not np.isfinite(_largest(latents)):
    raise UserError(f"{what} hold NaN or infinity")


def _largest(x) -> float:
  with jax.ensure_compile_time_eval():  # a known array in a function that is traced
    return float(abs(x).max())


def _known(x) -> bool:
  """Whether the values of an array can be read here and now."""
  return not isinstance(x, Tracer) and getattr(x, "is_fully_addressable", True)
