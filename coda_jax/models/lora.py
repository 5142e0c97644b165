"""LoRA adapters on the convolutions of a finished VAE.

Adapter (paper section 4, official `lora.py`): a convolution of the same kernel, stride and
padding down to `rank` channels, then a 1x1 convolution up, added to the frozen one's output.
No bias, no alpha.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from coda_jax.errors import UserError
from coda_jax.models.vae import AutoencoderKL


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

  def adapts(self, path: str) -> bool:
    """Whether the convolution at `path` (as `encoder.down.0.block.0.conv1`) gets an adapter."""
    half, _, name = path.partition(".")
    adapted = {"encoder": self.encoder, "decoder": self.decoder}.get(half, False)
    return adapted and any(part in name for part in self.name_parts)


def _convolve(conv: tuple, x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolution of NHWC by HWIO in the type of x; `conv` is (strides, padding)."""
  return jax.lax.conv_general_dilated(
    x, kernel.astype(x.dtype), *conv, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def _merged(kernel: jax.Array, down: jax.Array, up: jax.Array) -> jax.Array:
  """The kernel with the adapter in it, float32."""
  return kernel + jnp.einsum("hwir,ro->hwio", down, up[0, 0], precision="highest")


# The adapter is in the kernel forward and in the gradient of x, so that neither pass writes an
# output of the adapter, as large as an image. The adapter's own gradients are those of two
# convolutions beside the frozen one. The gradient of the whole kernel, as autodiff would take it,
# reads images less often but needs more products: in FLUX's encoder on a v5e chip, forward and
# backward, 0.77 TFLOP and 2.06 GB of HBM traffic an image instead of 0.60 and 2.29, where the
# products bound the time.
def _adapted_alone(conv, x, kernel, down, up):
  return _convolve(conv, x, _merged(kernel, down, up))


def _adapted_forward(conv, x, kernel, down, up):
  return _adapted(conv, x, kernel, down, up), (x, kernel, down, up)


def _adapted_backward(conv, saved, dy):
  x, kernel, down, up = saved
  hidden, pull_down = jax.vjp(lambda down: _convolve(conv, x, down), down)
  dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  d_up = dot("bpqr,bpqo->ro", hidden, dy)[None, None]
  (d_down,) = pull_down(dot("bpqo,ro->bpqr", dy, up[0, 0].astype(dy.dtype)).astype(dy.dtype))
  merged = _merged(kernel, down, up)
  _, pull = jax.vjp(functools.partial(_convolve, conv), x, merged)
  dx, d_kernel = pull(dy)  # d_kernel is dead code unless the kernel itself trains
  return dx, d_kernel, d_down, d_up


_adapted = jax.custom_vjp(_adapted_alone, nondiff_argnums=(0,))
_adapted.defvjp(_adapted_forward, _adapted_backward)


class LoRAConv(nnx.Module):
  """A convolution with an adapter.

  Parameters: `kernel` [kh, kw, in, out] and `bias` [out] of the adapted convolution,
  `lora_down` [kh, kw, in, rank] (normal, std 1/rank), `lora_up` [1, 1, rank, out] (zeros).
  """

  def __init__(self, base: nnx.Conv, rank: int, *, rngs: nnx.Rngs):
    assert base.bias is not None, "every convolution of the VAE has a bias"
    self.kernel, self.bias = base.kernel, base.bias
    self.strides, self.padding, self.dtype = base.strides, base.padding, base.dtype
    *window, out = self.kernel.shape
    self.lora_down = nnx.LoRAParam(jax.random.normal(rngs.params(), (*window, rank)) / rank)
    self.lora_up = nnx.LoRAParam(jnp.zeros((1, 1, rank, out)))

  def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b p q d"]:
    x, adapter = x.astype(self.dtype), (self.lora_down[...], self.lora_up[...])
    y = _adapted((self.strides, self.padding), x, self.kernel[...], *adapter)
    return y + self.bias[...].astype(x.dtype)

  def merged(self) -> nnx.Conv:
    """The convolution with the adapter in its kernel; its output is equal."""
    *size, cin, cout = self.kernel.shape
    kernel = _merged(self.kernel[...], self.lora_down[...], self.lora_up[...])
    return nnx.Conv(
      cin,
      cout,
      size,
      self.strides,
      padding=self.padding,
      dtype=self.dtype,
      kernel_init=lambda *_: kernel,
      bias_init=lambda *_: self.bias[...],
      rngs=nnx.Rngs(0),
    )


def _replace(module: nnx.Module, kind: type, make) -> None:
  """Replaces every submodule of this kind by `make(path, submodule)`, in place."""
  nodes = dict(nnx.iter_modules(module))
  for path, node in nodes.items():
    if type(node) is kind:
      setattr(nodes[path[:-1]], str(path[-1]), make(".".join(map(str, path)), node))


def add_lora(vae: AutoencoderKL, config: LoRAConfig | None, *, rngs: nnx.Rngs) -> AutoencoderKL:
  """Adds an adapter to every convolution that the config names; changes and returns `vae`."""
  if config is None:
    return vae

  def adapted(path, conv):
    return LoRAConv(conv, config.rank, rngs=rngs) if config.adapts(path) else conv

  _replace(vae, nnx.Conv, adapted)
  return vae


def merge_lora(module: nnx.Module) -> None:
  """Merges every adapter below `module` into the kernel that it adapts, in place."""
  _replace(module, LoRAConv, lambda _, conv: conv.merged())
