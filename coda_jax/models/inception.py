"""FID's Inception: `inception-2015-12-05.tgz`, as pytorch-fid and torch-fidelity port it.

It differs from torchvision's InceptionV3 in three points: average pools do not count padding, the
last block pools by maximum, and there are 1008 classes. Attributes carry torchvision's names.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

IMAGE_SIZE, POOL3, CLASSES = 299, 2048, 1008
SPATIAL = 17 * 17 * 7

# A step of a branch: "average", "max" (3x3, stride 1), "reduce" (max, 3x3, stride 2), or
# (name, channels, kernel[, stride]). Several steps in a list run side by side on the same input.


def _a(pool: int) -> tuple:
  return (
    [("branch1x1", 64, (1, 1))],
    [("branch5x5_1", 48, (1, 1)), ("branch5x5_2", 64, (5, 5))],
    [
      ("branch3x3dbl_1", 64, (1, 1)),
      ("branch3x3dbl_2", 96, (3, 3)),
      ("branch3x3dbl_3", 96, (3, 3)),
    ],
    ["average", ("branch_pool", pool, (1, 1))],
  )


_B = (
  [("branch3x3", 384, (3, 3), 2)],
  [
    ("branch3x3dbl_1", 64, (1, 1)),
    ("branch3x3dbl_2", 96, (3, 3)),
    ("branch3x3dbl_3", 96, (3, 3), 2),
  ],
  ["reduce"],
)


def _c(width: int) -> tuple:
  return (
    [("branch1x1", 192, (1, 1))],
    [
      ("branch7x7_1", width, (1, 1)),
      ("branch7x7_2", width, (1, 7)),
      ("branch7x7_3", 192, (7, 1)),
    ],
    [
      ("branch7x7dbl_1", width, (1, 1)),
      ("branch7x7dbl_2", width, (7, 1)),
      ("branch7x7dbl_3", width, (1, 7)),
      ("branch7x7dbl_4", width, (7, 1)),
      ("branch7x7dbl_5", 192, (1, 7)),
    ],
    ["average", ("branch_pool", 192, (1, 1))],
  )


_D = (
  [("branch3x3_1", 192, (1, 1)), ("branch3x3_2", 320, (3, 3), 2)],
  [
    ("branch7x7x3_1", 192, (1, 1)),
    ("branch7x7x3_2", 192, (1, 7)),
    ("branch7x7x3_3", 192, (7, 1)),
    ("branch7x7x3_4", 192, (3, 3), 2),
  ],
  ["reduce"],
)


def _e(pool: str) -> tuple:
  return (
    [("branch1x1", 320, (1, 1))],
    [
      ("branch3x3_1", 384, (1, 1)),
      [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))],
    ],
    [
      ("branch3x3dbl_1", 448, (1, 1)),
      ("branch3x3dbl_2", 384, (3, 3)),
      [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))],
    ],
    [pool, ("branch_pool", 192, (1, 1))],
  )


_BLOCKS = {
  "Mixed_5b": _a(32),
  "Mixed_5c": _a(64),
  "Mixed_5d": _a(64),
  "Mixed_6a": _B,
  "Mixed_6b": _c(128),
  "Mixed_6c": _c(160),
  "Mixed_6d": _c(160),
  "Mixed_6e": _c(192),
  "Mixed_7a": _D,
  "Mixed_7b": _e("average"),
  "Mixed_7c": _e("max"),
}


class Readouts(NamedTuple):
  """What Inception says of B images.

  Attributes:
    pool3: [B, 2048] features of FID.
    spatial: [B, 2023] features of sFID: the first 7 channels of TensorFlow's `mixed_6/conv` at
      17 x 17 positions, row by row, channels last, as ADM flattens them.
  """

  pool3: jax.Array | np.ndarray
  spatial: jax.Array | np.ndarray


class _Convolution(nnx.Module):
  """Convolution without bias, batch norm by stored statistics, ReLU."""

  def __init__(self, cin: int, cout: int, kernel: tuple[int, int], stride: int, padding: str, rngs):
    self.conv = nnx.Conv(
      cin,
      cout,
      kernel,
      strides=stride,
      padding=padding,
      use_bias=False,
      kernel_init=nnx.initializers.zeros,
      precision=jax.lax.Precision.HIGHEST,  # a TPU's default would multiply in bfloat16
      rngs=rngs,
    )
    self.bn = nnx.BatchNorm(cout, use_running_average=True, epsilon=1e-3, rngs=rngs)

  def __call__(self, x):
    return jax.nn.relu(self.bn(self.conv(x)))


_POOLS = {
  "average": lambda x: nnx.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
  "max": lambda x: nnx.max_pool(x, (3, 3), (1, 1), "SAME"),
  "reduce": lambda x: nnx.max_pool(x, (3, 3), (2, 2), "VALID"),
}


class _Mixed(nnx.Module):
  """The branches of `_BLOCKS[name]`, concatenated over channels."""

  def __init__(self, cin: int, name: str, rngs):
    self.name = name
    self.channels = sum(self._build(cin, branch, rngs) for branch in _BLOCKS[name])

  def _build(self, cin: int, steps: list, rngs) -> int:
    for step in steps:
      if isinstance(step, list):
        cin = sum(self._build(cin, [inner], rngs) for inner in step)
      elif isinstance(step, tuple):
        name, cout, kernel, *rest = step
        stride = rest[0] if rest else 1
        padding = "SAME" if stride == 1 else "VALID"
        setattr(self, name, _Convolution(cin, cout, kernel, stride, padding, rngs))
        cin = cout
    return cin

  def _run(self, steps: list, x):
    for step in steps:
      if isinstance(step, list):
        x = jnp.concatenate([self._run([inner], x) for inner in step], axis=-1)
      else:
        x = _POOLS[step](x) if isinstance(step, str) else getattr(self, step[0])(x)
    return x

  def __call__(self, x):
    return jnp.concatenate([self._run(branch, x) for branch in _BLOCKS[self.name]], axis=-1)


class Inception(nnx.Module):
  """Zeros until weights are loaded. Frozen: take no gradient for its parameters.

  Computes in float32 with exact products on every device: published figures are float32's.
  """

  def __init__(self):
    rngs = nnx.Rngs(0)  # The layers ask for it; zeros and ones draw nothing.
    self.Conv2d_1a_3x3 = _Convolution(3, 32, (3, 3), 2, "VALID", rngs)
    self.Conv2d_2a_3x3 = _Convolution(32, 32, (3, 3), 1, "VALID", rngs)
    self.Conv2d_2b_3x3 = _Convolution(32, 64, (3, 3), 1, "SAME", rngs)
    self.Conv2d_3b_1x1 = _Convolution(64, 80, (1, 1), 1, "VALID", rngs)
    self.Conv2d_4a_3x3 = _Convolution(80, 192, (3, 3), 1, "VALID", rngs)
    channels = 192
    for name in _BLOCKS:
      block = _Mixed(channels, name, rngs)
      setattr(self, name, block)
      channels = block.channels
    self.fc = nnx.Linear(
      POOL3,
      CLASSES,
      kernel_init=nnx.initializers.zeros,
      precision=jax.lax.Precision.HIGHEST,
      rngs=rngs,
    )

  def __call__(self, x: Float[Array, "b 299 299 3"]) -> Readouts:
    """Readouts of images in about [-1, 1]; `evaluation.conventions` resizes and scales them."""
    reduce = _POOLS["reduce"]
    x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
    x = reduce(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(reduce(x))))
    spatial = None
    for name in _BLOCKS:
      block = getattr(self, name)
      if name == "Mixed_6d":  # TensorFlow calls it mixed_6
        spatial = block.branch1x1(x)[..., :7].reshape(len(x), SPATIAL)
      x = block(x)
    assert spatial is not None
    return Readouts(jnp.mean(x, axis=(1, 2)), spatial)

  def logits(self, pool3: Float[Array, "b 2048"]) -> Float[Array, "b 1008"]:
    """Logits without the bias, of which the Inception score is made."""
    exact = jax.lax.Precision.HIGHEST
    return jnp.matmul(pool3, self.fc.kernel[...], precision=exact)
