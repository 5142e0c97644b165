"""Discriminators: what an adversarial loss trains against.

`DinoDiscriminator` is the paper's: five trained heads on a frozen DINO (after StyleGAN-T, arXiv
2301.09515). `PatchDiscriminator` (pix2pix, arXiv 1611.07004) is for where DINO's weights are
missing. Of both, what trains is `TRAINABLE`; spectral-norm vectors (`PowerIteration`) and running
statistics (`nnx.BatchStat`) change at every call with `train=True`.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from coda_jax.models.dino import DINO, IMAGE_SIZE, WIDTH, dino_input, takes_window

Logits = Float[Array, "b n"]

# What the discriminator's optimizer sees.
TRAINABLE = nnx.All(nnx.PathContains("heads"), nnx.Param)


class PowerIteration(nnx.Variable):
  """Singular vectors that spectral normalisation carries from call to call."""


# Variables that every call with `train=True` changes.
CHANGED = nnx.Any(PowerIteration, nnx.BatchStat)


def _unit(x):
  return x / jnp.maximum(jnp.linalg.norm(x), 1e-12)


class SpectralConv(nnx.Module):
  """1D convolution [b, n, in] -> [b, n, out] with circular padding and a kernel of norm about 1.

  Spectral normalisation (Miyato et al., arXiv 1802.05957) with W the kernel as a [k * in, out]
  matrix: a training call does one power iteration, v = unit(W u) and u = unit(v W); every call
  divides W by sigma = v W u, whose gradient goes to W alone.

  Parameters: `kernel` [k, in, out] (k odd) and `bias`; state: `u` [out], `v` [k * in].
  """

  def __init__(self, in_channels: int, out_channels: int, size: int, *, rngs: nnx.Rngs):
    shape = (size, in_channels, out_channels)
    n = math.prod(shape)
    # One flat draw: on CPU, every shape of draws is compiled, and those of many axes slowly.
    draws = jax.random.normal(rngs.params(), (n + out_channels + size * in_channels,))
    self.kernel = nnx.Param(0.02 * draws[:n].reshape(shape))
    self.bias = nnx.Param(jnp.zeros((out_channels,)))
    self.u = PowerIteration(_unit(draws[n : n + out_channels]))
    self.v = PowerIteration(_unit(draws[n + out_channels :]))

  def __call__(self, x, *, train: bool):
    kernel = self.kernel[...]
    kernel = (kernel / self._sigma(kernel, train)).astype(x.dtype)
    pad = len(kernel) // 2
    x = jnp.pad(x, ((0, 0), (pad, pad), (0, 0)), mode="wrap")
    y = jax.lax.conv_general_dilated(
      x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    return y + self.bias[...].astype(x.dtype)

  def _sigma(self, kernel, train: bool):
    """v W u; a training call updates u and v first."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    with jax.default_matmul_precision("highest"):
      if train:
        fixed = jax.lax.stop_gradient(matrix)
        # `variable[...] = x` would compare shardings, which costs seconds of tracing in all.
        self.v.set_value(_unit(fixed @ self.u[...]))
        self.u.set_value(_unit(self.v[...] @ fixed))
      return self.v[...] @ matrix @ self.u[...]


class BatchNorm(nnx.Module):
  """Batch norm over every axis but the last, in float32.

  Under `jax.jit` with a sharded batch the means are over the global batch. Parameters: `scale`,
  `bias`; state: running `mean` and `var`. As in PyTorch the running variance is the unbiased one
  (that of `nnx.BatchNorm` is not): running = 0.9 running + 0.1 batch's. Epsilon is 1e-6.
  """

  def __init__(self, channels: int):
    self.scale = nnx.Param(jnp.ones((channels,)))
    self.bias = nnx.Param(jnp.zeros((channels,)))
    self.mean = nnx.BatchStat(jnp.zeros((channels,)))
    self.var = nnx.BatchStat(jnp.ones((channels,)))

  def __call__(self, x, *, train: bool):
    dtype, x = x.dtype, x.astype(jnp.float32)
    mean, var = self._batch_statistics(x) if train else (self.mean[...], self.var[...])
    y = (x - mean) * jax.lax.rsqrt(var + 1e-6) * self.scale[...] + self.bias[...]
    return y.astype(dtype)

  def _batch_statistics(self, x):
    """(mean, biased variance) of a batch; updates the running statistics."""
    axes = tuple(range(x.ndim - 1))
    n = math.prod(x.shape[:-1])
    mean = jnp.mean(x, axes)
    var = jnp.mean(jnp.square(x - mean), axes)
    new_mean, new_var = jax.lax.stop_gradient((mean, var * (n / max(n - 1, 1))))
    self.mean.set_value(0.9 * self.mean[...] + 0.1 * new_mean)
    self.var.set_value(0.9 * self.var[...] + 0.1 * new_var)
    return mean, var


def _leaky_relu(x):
  return jax.nn.leaky_relu(x, 0.2)


class _Block(nnx.Module):
  def __init__(self, size: int, *, rngs: nnx.Rngs):
    self.conv = SpectralConv(WIDTH, WIDTH, size, rngs=rngs)
    self.norm = BatchNorm(WIDTH)

  def __call__(self, x, *, train: bool):
    return _leaky_relu(self.norm(self.conv(x, train=train), train=train))


class DinoHead(nnx.Module):
  """One logit a token."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.block1 = _Block(1, rngs=rngs)
    self.block2 = _Block(9, rngs=rngs)
    self.out = SpectralConv(WIDTH, 1, 1, rngs=rngs)

  def __call__(self, x: Float[Array, "b n c"], *, train: bool) -> Float[Array, "b n"]:
    x = self.block1(x, train=train)
    x = (x + self.block2(x, train=train)) * math.sqrt(0.5)
    return self.out(x, train=train)[..., 0].astype(jnp.float32)


class _PatchHead(nnx.Module):
  def __init__(self, width: int, layers: int, dtype, *, rngs: nnx.Rngs):
    widths = [3, *(width * min(2**i, 8) for i in range(layers + 1)), 1]
    strides = [2] * layers + [1, 1]
    conv = functools.partial(
      nnx.Conv,
      kernel_size=(4, 4),
      padding=((1, 1), (1, 1)),
      dtype=dtype,
      kernel_init=nnx.initializers.normal(0.02),
      rngs=rngs,
    )
    self.convs = nnx.List(
      [conv(a, b, strides=s) for a, b, s in zip(widths, widths[1:], strides, strict=False)]
    )
    self.norms = nnx.List([BatchNorm(n) for n in widths[2:-1]])

  def __call__(self, x, *, train: bool):
    first, *between, last = self.convs
    x = _leaky_relu(first(x))
    for conv, norm in zip(between, self.norms, strict=True):
      x = _leaky_relu(norm(conv(x), train=train))
    return last(x).reshape(len(x), -1).astype(jnp.float32)


class Discriminator(nnx.Module):
  """Frozen features, then trained `heads`, one on each feature map.

  A training step runs `features` once for each distinct view of an image, and `logits` as often
  as the objective asks: each run with `train=True` is one power iteration and one update of the
  running statistics.
  """

  heads: nnx.List

  def features(
    self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
  ) -> tuple[Array, ...]:
    """What the heads look at, of images in [-1, 1]. `key` draws the view, if there is a choice."""
    raise NotImplementedError

  def same_view(
    self, size: tuple[int, int], a: PRNGKeyArray, b: PRNGKeyArray
  ) -> bool | Bool[Array, ""]:
    """Whether two keys draw the same view of images of `size`; a Python bool if no draw decides."""
    return True

  def logits(self, features: Sequence[Array], *, train: bool) -> Logits:
    """Realness of every patch, high is real, head after head."""
    pairs = zip(self.heads, features, strict=True)
    return jnp.concatenate([head(f, train=train) for head, f in pairs], axis=1)

  def __call__(
    self, images: Float[Array, "b h w 3"], *, train: bool, key: PRNGKeyArray | None = None
  ) -> Logits:
    """`logits` of the `features` of images in [-1, 1]."""
    return self.logits(self.features(images, key), train=train)


class DinoDiscriminator(Discriminator):
  """980 logits an image: five heads on the 196 tokens of DINO's five readouts."""

  def __init__(self, dino: DINO, *, dtype=jnp.float32, rngs: nnx.Rngs):
    self.dino = dino
    self.dtype = dtype
    self.heads = nnx.List([DinoHead(rngs=rngs) for _ in range(5)])

  def features(
    self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
  ) -> tuple[Float[Array, "b 196 384"], ...]:
    """DINO's readouts. `key` allows the random crop of images above 224 (see `dino_input`)."""
    return tuple(f.astype(self.dtype) for f in self.dino(dino_input(images, key)))

  def same_view(
    self, size: tuple[int, int], a: PRNGKeyArray, b: PRNGKeyArray
  ) -> bool | Bool[Array, ""]:
    """True where neither key takes a random window."""
    if min(size) <= IMAGE_SIZE:
      return True
    return ~(takes_window(a) | takes_window(b))


class PatchDiscriminator(Discriminator):
  """PatchGAN: strided 4x4 convolutions with batch norm on the image itself."""

  def __init__(self, *, width: int = 64, layers: int = 3, dtype=jnp.float32, rngs: nnx.Rngs):
    self.dtype = dtype
    self.heads = nnx.List([_PatchHead(width, layers, dtype, rngs=rngs)])

  def features(
    self, images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
  ) -> tuple[Float[Array, "b h w 3"], ...]:
    """The images. There is no choice of view."""
    return (images.astype(self.dtype),)
