"""VGG16's convolutions (Simonyan and Zisserman, arXiv 1409.1556), frozen: the eyes of LPIPS."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

# Output channels of the convolutions between two poolings.
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))

_relu = jax.nn.relu  # a name of its own: the parity test looks at its inputs


class VGG16(nnx.Module):
  """Attributes `conv1_1` to `conv5_3`, 3x3; zeros until weights are loaded."""

  def __init__(self, *, dtype=jnp.float32):
    self.dtype = dtype
    rngs = nnx.Rngs(0)  # The layers ask for it; zeros draw nothing.
    zeros = nnx.initializers.zeros
    in_channels = 3
    for stage, widths in enumerate(STAGES, 1):
      for i, out_channels in enumerate(widths, 1):
        conv = nnx.Conv(
          in_channels, out_channels, (3, 3), dtype=dtype, kernel_init=zeros, rngs=rngs
        )
        setattr(self, f"conv{stage}_{i}", conv)
        in_channels = out_channels

  def __call__(self, x: Float[Array, "b h w 3"]) -> tuple[Float[Array, "b _ _ _"], ...]:
    """Maps relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 of images normalised as ImageNet's.

    Map s has floor(h / 2^s) x floor(w / 2^s) positions, s from 0. Computed and returned in `dtype`.
    """
    x = x.astype(self.dtype)
    maps = []
    for stage, widths in enumerate(STAGES, 1):
      if stage > 1:
        x = nnx.max_pool(x, (2, 2), strides=(2, 2))
      for i in range(1, len(widths) + 1):
        x = _relu(getattr(self, f"conv{stage}_{i}")(x))
      maps.append(x)
    return tuple(maps)
