"""Convolutions that carry a LoRA adapter, and the rule for which of them do.

Adapter (paper section 4, official `lora.py`): a convolution of the same kernel, stride and
padding down to `rank` channels, then a 1x1 convolution up, added to the frozen one's output.
No bias, no alpha.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from coda_jax.errors import UserError
from coda_jax.ops.platform import platform
from coda_jax.ops.recompute import after

Padding = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
  """Which convolutions get an adapter.

  Attributes:
    rank: channels between the adapter's two convolutions.
    name_parts: a convolution has an adapter if its name contains one of these.
    encoder: adapt the encoder (paper, Table 4a).
    decoder: adapt the decoder.
  """

  rank: int = 32
  name_parts: tuple[str, ...] = ("conv1", "conv2")
  encoder: bool = True
  decoder: bool = True

  def __post_init__(self):
    if self.rank < 1:
      raise UserError(f"lora.rank is {self.rank}; it must be at least 1")

  def rank_for(self, path: str) -> int:
    """Rank of the adapter of the convolution at `path` (as `encoder.down.0…`), 0 for none."""
    half, _, name = path.partition(".")
    adapted = {"encoder": self.encoder, "decoder": self.decoder}.get(half, False)
    return self.rank if adapted and any(part in name for part in self.name_parts) else 0


def _convolve(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
  return jax.lax.conv_general_dilated(
    x,
    kernel.astype(x.dtype),
    (stride, stride),
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def _delta(down: jax.Array, up: jax.Array) -> jax.Array:
  """What the adapter adds to the kernel."""
  return jnp.einsum("hwir,ro->hwio", down, up[0, 0], precision="highest")


def _point(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return _convolve(x, kernel, 1, ((0, 0), (0, 0)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _adapted(stride, padding, x, kernel, down, up):
  """Convolution with the adapter in the kernel, and the gradient of one beside it.

  One large image less in either direction than two convolutions and their sum, and no gradient of
  the whole kernel unless it trains.
  """
  return _convolve(x, kernel + _delta(*after(x, (down, up))), stride, padding)


def _adapted_bwd(stride, padding, kept, dy):
  x, kernel, down, up = kept
  y, to_down = jax.vjp(lambda down: _convolve(x, down, stride, padding), down)
  (d_down,) = to_down(_point(dy, up.swapaxes(2, 3)))
  d_up = jnp.matmul(y.reshape(-1, y.shape[-1]).T, dy.reshape(-1, dy.shape[-1]))[None, None]
  # Last, so that what the adapter's gradients take is not held beside the image's.
  kernel = after((d_down, d_up), kernel + _delta(down, up))
  (d_kernel,) = jax.vjp(lambda k: _convolve(x, k, stride, padding), kernel)[1](dy)
  return _input_gradient(dy, kernel, stride, padding, x), d_kernel, d_down, d_up


def _input_gradient(dy, kernel, stride: int, padding: Padding, x) -> jax.Array:
  """dx of `_convolve`; at strides a quarter at a time: XLA:CPU holds all patches of dx there."""
  parts = []
  for part in jnp.split(kernel, math.gcd(kernel.shape[2], 4) if stride > 1 else 1, axis=2):
    part = after(parts or dy, part)
    like = jax.ShapeDtypeStruct((*x.shape[:3], part.shape[2]), x.dtype)
    parts += jax.linear_transpose(lambda x, k=part: _convolve(x, k, stride, padding), like)(dy)
  return jnp.concatenate(parts, 3)


_adapted.defvjp(
  lambda stride, padding, *args: (_adapted(stride, padding, *args), args), _adapted_bwd
)


class Conv(nnx.Module):
  """2D convolution, NHWC, with an optional LoRA adapter.

  Parameters: `kernel` [kh, kw, in, out], `bias` [out]; with an adapter also
  `lora_down` [kh, kw, in, rank] (normal, std 1/rank) and `lora_up` [1, 1, rank, out] (zeros).

  With `fold` the adapter is added to the kernel, in float32, before the convolution. That is the
  same function with more products in the backward pass (a gradient of the whole kernel) and far
  less memory traffic: nothing of the adapter's is as large as an image.
  """

  def __init__(
    self,
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    *,
    stride: int = 1,
    padding: Padding | None = None,
    rank: int = 0,
    fold: bool = False,
    rngs: nnx.Rngs,
  ):
    same = (kernel_size // 2, kernel_size // 2)
    self.stride, self.padding, self.fold = stride, padding or (same, same), fold
    shape = (kernel_size, kernel_size, in_channels)
    bound = 1 / math.sqrt(math.prod(shape))  # PyTorch's default initialisation

    def uniform(size):
      return jax.random.uniform(rngs.params(), size, minval=-bound, maxval=bound)

    self.kernel = nnx.Param(uniform((*shape, out_channels)))
    self.bias = nnx.Param(uniform((out_channels,)))
    if rank:
      self.lora_down = nnx.LoRAParam(jax.random.normal(rngs.params(), (*shape, rank)) / rank)
      self.lora_up = nnx.LoRAParam(jnp.zeros((1, 1, rank, out_channels)))
    self.rank = rank

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
    kernel, window = self.kernel[...], (self.stride, self.padding)
    if not self.rank:
      y = _convolve(x, kernel, *window)
    else:
      down, up = self.lora_down[...], self.lora_up[...]
      if self.fold:
        y = _convolve(x, kernel + _delta(down, up), *window)
      elif platform() == "cpu" and x.dtype == jnp.float32:
        y = _adapted(*window, x, kernel, down, up)
      else:
        y = _convolve(x, kernel, *window) + _point(_convolve(x, down, *window), up)
    return y + self.bias[...].astype(x.dtype)

  def merge(self) -> None:
    """Folds the adapter into `kernel`, with equal output, and drops it."""
    if self.rank:
      self.kernel[...] = self.kernel[...] + _delta(self.lora_down[...], self.lora_up[...])
      del self.lora_down, self.lora_up
      self.rank = 0


def merge_lora(module: nnx.Module) -> None:
  """Folds every adapter below `module` into the weights it adapts, in place."""
  for _, node in nnx.iter_graph(module):
    if isinstance(node, Conv):
      node.merge()
