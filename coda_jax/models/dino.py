"""DINO's ViT-S/16 (Caron et al., arXiv 2104.14294) as the frozen body of the discriminator.

It differs from the published model as the official CODA code does: tanh-GELU, no final norm, the
position embedding of 14x14 patches only. The key bias is zeroed by the converter, which changes
nothing but rounding: it adds the same number to all logits of a query.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from coda_jax.ops.resize import area_matrix, bicubic_matrix

IMAGE_SIZE, PATCH_SIZE = 224, 16
TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
MEAN = np.array((0.485, 0.456, 0.406), np.float32)
STD = np.array((0.229, 0.224, 0.225), np.float32)
WIDTH, HEADS, DEPTH, HIDDEN = 384, 6, 12, 1536
READOUTS = (2, 5, 8, 11)  # blocks whose output is read, beside the embedding itself


def dino_input(
  images: Float[Array, "b h w 3"], key: PRNGKeyArray | None = None
) -> Float[Array, "b 224 224 3"]:
  """ImageNet-normalised 224x224 images from images in [-1, 1].

  Higher than 224: area pooling; else bicubic. With `key` and both sides above 224, half of the
  calls take a random 224x224 window instead, one for the whole batch. Both are a pair of matrices,
  so which one it is costs nothing and needs no branch.
  """
  h, w = images.shape[1:3]
  if h > IMAGE_SIZE:
    rows, columns = area_matrix(h, IMAGE_SIZE), area_matrix(w, IMAGE_SIZE)
  else:
    rows, columns = bicubic_matrix(h, IMAGE_SIZE), bicubic_matrix(w, IMAGE_SIZE)
  if key is not None and min(h, w) > IMAGE_SIZE:
    _, top, left = jax.random.split(key, 3)
    crop = takes_window(key)
    rows = jnp.where(crop, _window(top, h), rows)
    columns = jnp.where(crop, _window(left, w), columns)
  x = images.astype(jnp.float32) * (0.5 / STD) + (0.5 - MEAN) / STD
  exact = jax.lax.Precision.HIGHEST
  x = jnp.einsum("ph,bhwc->bpwc", rows, x, precision=exact)
  return jnp.einsum("qw,bpwc->bpqc", columns, x, precision=exact)


def takes_window(key: PRNGKeyArray) -> Bool[Array, ""]:
  """Whether `dino_input` takes a random window under `key`."""
  return jax.random.bernoulli(jax.random.split(key, 3)[0])


def _window(key, n):
  """[224, n] matrix that takes 224 consecutive samples from a random start."""
  start = jax.random.randint(key, (), 0, n - IMAGE_SIZE + 1)
  return (jnp.arange(n) == start + jnp.arange(IMAGE_SIZE)[:, None]).astype(jnp.float32)


def _linear(cin, cout, dtype, rngs):
  zeros = nnx.initializers.zeros
  return nnx.Linear(cin, cout, dtype=dtype, kernel_init=zeros, rngs=rngs)


def _layer_norm(rngs):
  """Float32, the result too: the Linear behind it casts to its own type."""
  return nnx.LayerNorm(WIDTH, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


class _Attention(nnx.Module):
  def __init__(self, dtype, rngs):
    self.qkv = _linear(WIDTH, 3 * WIDTH, dtype, rngs)
    self.proj = _linear(WIDTH, WIDTH, dtype, rngs)

  def __call__(self, x):
    b, n, _ = x.shape
    q, k, v = jnp.moveaxis(self.qkv(x).reshape(b, n, 3, HEADS, WIDTH // HEADS), 2, 0)
    return self.proj(jax.nn.dot_product_attention(q, k, v).reshape(b, n, WIDTH))


class _MLP(nnx.Module):
  def __init__(self, dtype, rngs):
    self.fc1 = _linear(WIDTH, HIDDEN, dtype, rngs)
    self.fc2 = _linear(HIDDEN, WIDTH, dtype, rngs)

  def __call__(self, x):
    return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class _Block(nnx.Module):
  """Branches compute in `dtype`; the residual stream and the norms stay float32."""

  def __init__(self, dtype, rngs):
    self.norm1, self.attn = _layer_norm(rngs), _Attention(dtype, rngs)
    self.norm2, self.mlp = _layer_norm(rngs), _MLP(dtype, rngs)

  def __call__(self, x):
    x = x + self.attn(self.norm1(x))
    return x + self.mlp(self.norm2(x))


class _PatchEmbed(nnx.Module):
  """A strided convolution as one matmul: patches do not overlap."""

  def __init__(self, dtype):
    self.dtype = dtype
    self.kernel = nnx.Param(jnp.zeros((PATCH_SIZE, PATCH_SIZE, 3, WIDTH)))
    self.bias = nnx.Param(jnp.zeros((WIDTH,)))

  def __call__(self, x):
    b, n = x.shape[0], IMAGE_SIZE // PATCH_SIZE
    x = x.reshape(b, n, PATCH_SIZE, n, PATCH_SIZE, 3).transpose(0, 1, 3, 2, 4, 5)
    x, kernel, bias = (t.astype(self.dtype) for t in (x, self.kernel[...], self.bias[...]))
    return x.reshape(b, TOKENS, -1) @ kernel.reshape(-1, WIDTH) + bias


class DINO(nnx.Module):
  """Zeros until weights are loaded. Frozen: take no gradient for its parameters.

  Parameters: `cls_token` [384], `pos_embed` [197, 384] (class token first), `patch_embed`,
  `blocks.0` to `blocks.11` with the published names.
  """

  def __init__(self, *, dtype=jnp.float32):
    rngs = nnx.Rngs(0)  # The layers ask for it; zeros and ones draw nothing.
    self.cls_token = nnx.Param(jnp.zeros((WIDTH,)))
    self.pos_embed = nnx.Param(jnp.zeros((1 + TOKENS, WIDTH)))
    self.patch_embed = _PatchEmbed(dtype)
    self.blocks = nnx.List([_Block(dtype, rngs) for _ in range(DEPTH)])

  def __call__(self, x: Float[Array, "b 224 224 3"]) -> tuple[Float[Array, "b 196 384"], ...]:
    """Five readouts, each patch tokens + class token, float32, of `dino_input`'s images.

    They follow the position embedding and blocks 2, 5, 8 and 11.
    """
    patches = self.patch_embed(x).astype(jnp.float32)
    cls = jnp.broadcast_to(self.cls_token[...], (len(x), 1, WIDTH))
    x = jnp.concatenate([cls, patches], axis=1) + self.pos_embed[...]
    readouts = [x[:, 1:] + x[:, :1]]
    for i, block in enumerate(self.blocks):
      x = block(x)
      if i in READOUTS:
        readouts.append(x[:, 1:] + x[:, :1])
    return tuple(readouts)
