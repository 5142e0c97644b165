"""VGG16's convolutions (Simonyan and Zisserman, arXiv 1409.1556), frozen: the eyes of LPIPS."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from coda_jax.ops.platform import platform
from coda_jax.ops.recompute import recompute

# Output channels of the convolutions between two poolings.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

_relu = jax.nn.relu  # a name of its own: the parity test looks at its inputs


class _Conv3x3(nnx.Module):
  def __init__(self, in_channels: int, out_channels: int):
    self.kernel = nnx.Param(jnp.zeros((3, 3, in_channels, out_channels)))
    self.bias = nnx.Param(jnp.zeros((out_channels,)))

  def __call__(self, x):
    y = jax.lax.conv_general_dilated(
      x,
      self.kernel[...].astype(x.dtype),
      (1, 1),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return y + self.bias[...].astype(x.dtype)


def _max_pool(x):
  """2x2, stride 2; but for TPUs, which have it, as maxima of slices: faster backward on CPUs.

  Gradients differ where elements are equal; behind a ReLU only zeros are, and these have none.
  """
  if platform() == "tpu":
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
  h, w = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
  top, bottom = x[:, 0:h:2], x[:, 1:h:2]
  return jnp.maximum(
    jnp.maximum(top[:, :, 0:w:2], top[:, :, 1:w:2]),
    jnp.maximum(bottom[:, :, 0:w:2], bottom[:, :, 1:w:2]),
  )


class VGG16(nnx.Module):
  """Attributes `conv1_1` to `conv5_3`; zeros until weights are loaded."""

  def __init__(self, *, dtype=jnp.float32):
    self.dtype = dtype
    in_channels = 3
    for stage, widths in enumerate(STAGES, 1):
      for i, out_channels in enumerate(widths, 1):
        setattr(self, f"conv{stage}_{i}", _Conv3x3(in_channels, out_channels))
        in_channels = out_channels

  def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b _ _ _"], ...]:
    """Maps relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of images normalised as ImageNet's.

    Map s has floor(h / 2^s) x floor(w / 2^s) positions, s from 0. Computed and returned in `dtype`.
    """
    x = x.astype(self.dtype)
    maps = []
    for stage, widths in enumerate(STAGES, 1):
      if stage > 1:
        x = _max_pool(x)
      for i in range(1, len(widths) + 1):
        conv = getattr(self, f"conv{stage}_{i}")
        # On CPUs, so that kernels are transposed for the backward pass when it is there.
        x = _relu((recompute(conv) if platform() == "cpu" else conv)(x))
      maps.append(x)
    return tuple(maps)
