"""What the discriminator may see instead of the plain images: DiffAug and a fading blur.

Options of the official code, off there and by default. Each is linear in the image, and written as
small matrices, so that gradients and TPUs like them; which of them act is data, not control flow.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from coda_jax.errors import UserError

Images = Float[Array, "b h w 3"]


def diff_augment(
  images: Images,
  key: PRNGKeyArray,
  *,
  probability: Float[Array, ""] | float = 1.0,
  cutout: float = 0.2,
) -> Images:
  """Translation, colour and cutout (DiffAugment, Zhao et al., arXiv 2006.10738).

  Each of the three acts on the whole batch with `probability`; the amounts are drawn for each
  image. Translation is by up to 1/8 of a side with zeros moving in; colour changes brightness,
  saturation and contrast; cutout zeroes a box of `cutout` of each side (0: none). Images in
  [-1, 1] may leave that range.
  """
  gates, amounts = jax.random.split(key)
  act = jax.random.uniform(gates, (3,)) <= probability
  return _augment(images, act, jax.random.uniform(amounts, (7, len(images))), cutout)


def _augment(
  images: Images, act: Bool[Array, "3"], amounts: Float[Array, "7 b"], cutout: float
) -> Images:
  x = images.astype(jnp.float32)
  _, h, w, _ = x.shape
  move, color, cut = act
  amounts = amounts[..., None, None, None]  # each [b, 1, 1, 1]

  def moved(n, amount):
    reach = round(n / 8)
    by = jnp.where(move, jnp.floor(amount * (2 * reach + 1)) - reach, 0).reshape(-1, 1, 1)
    return (jnp.arange(n) == jnp.arange(n)[:, None] + by).astype(jnp.float32)

  exact = jax.lax.Precision.HIGHEST
  x = jnp.einsum("bph,bhwc->bpwc", moved(h, amounts[0]), x, precision=exact)
  x = jnp.einsum("bqw,bpwc->bpqc", moved(w, amounts[1]), x, precision=exact)

  brightness = jnp.where(color, amounts[2] - 0.5, 0)
  saturation = jnp.where(color, 2 * amounts[3], 1)
  contrast = jnp.where(color, amounts[4] + 0.5, 1)
  x = x + brightness
  grey = jnp.mean(x, axis=3, keepdims=True)
  x = (x - grey) * saturation + grey
  mean = jnp.mean(x, axis=(1, 2, 3), keepdims=True)
  x = (x - mean) * contrast + mean

  def inside(n, amount):
    side = round(n * cutout)
    first = jnp.floor(amount * (n + 1 - side % 2)) - side // 2
    first, last = (jnp.clip(i, 0, n - 1).reshape(-1, 1) for i in (first, first + side - 1))
    return (jnp.arange(n) >= first) & (jnp.arange(n) <= last)

  if cutout > 0:
    box = inside(h, amounts[5])[:, :, None, None] & inside(w, amounts[6])[:, None, :, None]
    x = jnp.where(box & cut, 0, x)
  return x


def fade_blur(images: Images, strength: Float[Array, ""] | float) -> Images:
  """Blurs with a window 2^-(i/s)^2, |i| <= 3 s, where s = strength * sqrt(h / 2), mirrored borders.

  The official schedule is strength = 1 - step / (2 * steps). Below s = 1/3 nothing happens.

  Raises:
    UserError: a side is too short to mirror at full strength.
  """
  h, w = images.shape[1:3]
  full = math.sqrt(h / 2)
  radius = math.floor(3 * full)
  if min(h, w) <= radius:
    raise UserError(f"the blur of {h}x{w} images reaches {radius} pixels, more than a side has")
  sigma = jnp.asarray(strength, jnp.float32) * full
  i = jnp.arange(-radius, radius + 1)
  window = jnp.exp2(-jnp.square(i / jnp.maximum(sigma, 1e-6)))
  window = jnp.where(jnp.abs(i) <= jnp.floor(3 * sigma), window, 0)
  window = window / jnp.sum(window)

  def matrix(n):
    mirrored = np.pad(np.arange(n), radius, mode="reflect")
    columns = np.lib.stride_tricks.sliding_window_view(mirrored, 2 * radius + 1)
    return jnp.zeros((n, n)).at[np.arange(n)[:, None], columns].add(window)

  exact = jax.lax.Precision.HIGHEST
  x = jnp.einsum("ph,bhwc->bpwc", matrix(h), images.astype(jnp.float32), precision=exact)
  return jnp.einsum("qw,bpwc->bpqc", matrix(w), x, precision=exact)
