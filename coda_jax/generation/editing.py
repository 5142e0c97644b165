"""Which tokens an edit of an image changes, and how its pixels are put together."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Num

from coda_jax.errors import UserError


def touched_tokens(
  mask: Bool[np.ndarray, "h w"], patch_sizes: Sequence[int], stride: int, least: float = 0.0
) -> Bool[np.ndarray, "n"]:
  """Tokens to be sampled anew when the pixels of `mask` are to change.

  A token's area is the latents that its level pools into it, each of stride x stride pixels: bin i
  of p over h latents goes from floor(i·h/p) to ceil((i+1)·h/p). (The VAE looks somewhat farther.)

  Args:
    mask: True where the image is to change; its sides are the training size.
    least: the part of a token's area above which it is sampled anew. 0: any pixel in it is enough,
      and the coarsest levels, which see the whole image, always change. 0.5 keeps the coarse tokens
      that are mostly outside.

  Returns:
    All levels flattened, coarse to fine, row by row.

  Raises:
    UserError: the mask has another size, or chooses nothing.
  """
  side = patch_sizes[-1] * stride
  if mask.shape != (side, side):
    raise UserError(
      f"a mask of {mask.shape[1]} x {mask.shape[0]} pixels; the generator's images have "
      f"{side} x {side}"
    )
  if not 0 <= least < 1:
    raise UserError(f"least is {least}; it is a part of a token's area, from 0 to below 1")
  latents = mask.reshape(patch_sizes[-1], stride, patch_sizes[-1], stride).mean((1, 3))
  out = []
  for p in patch_sizes:
    n = patch_sizes[-1]
    pool = np.zeros((p, n))
    for i in range(p):
      start, stop = i * n // p, -(-(i + 1) * n // p)
      pool[i, start:stop] = 1 / (stop - start)
    out.append((pool @ latents @ pool.T).ravel() > least + 1e-9)
  out = np.concatenate(out)
  if not out.any():
    raise UserError("the mask chooses no token: nothing would change")
  return out


def box_mask(box: Sequence[int], side: int) -> Bool[np.ndarray, "{side} {side}"]:
  """True inside of (left, top, right, bottom), in pixels. Raises UserError if it is no box."""
  left, top, right, bottom = box
  if not (0 <= left < right <= side and 0 <= top < bottom <= side):
    raise UserError(
      f"the box {left},{top},{right},{bottom} is not left,top,right,bottom within "
      f"{side} x {side} pixels"
    )
  mask = np.zeros((side, side), bool)
  mask[top:bottom, left:right] = True
  return mask


def paste(
  images: Num[np.ndarray, "b h w 3"],
  made: Num[np.ndarray, "b h w 3"],
  mask: Bool[np.ndarray, "h w"],
) -> Num[np.ndarray, "b h w 3"]:
  """`made` inside of the mask, `images` outside."""
  return np.where(mask[..., None], made, images)
