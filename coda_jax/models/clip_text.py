"""CLIP's text encoder (Radford et al., arXiv 2103.00020): ViT-L/14's by default.

A causal transformer with pre-norm blocks. Its `last_hidden_state`, after the final norm, is what
U-ViT's and the paper's text-to-image models see; FLUX's `text_encoder` is the same network.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from coda_jax.errors import UserError

_ACTIVATIONS = {
  "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
  """Shape of a text encoder.

  Attributes:
    vocabulary: tokens.
    context: positions; texts are padded and cut to it.
    width, layers, heads, hidden: of the transformer; `hidden` is the MLPs' inner width.
    activation: `quick_gelu` (OpenAI's weights) or `gelu` (most of OpenCLIP's).
  """

  vocabulary: int = 49408
  context: int = 77
  width: int = 768
  layers: int = 12
  heads: int = 12
  hidden: int = 3072
  activation: str = "quick_gelu"

  def __post_init__(self):
    if self.heads < 1 or self.width % self.heads:
      raise UserError(f"a width of {self.width} does not divide into {self.heads} heads")
    if self.activation not in _ACTIVATIONS:
      raise UserError(
        f"unknown activation {self.activation!r}; known are {', '.join(_ACTIVATIONS)}"
      )


class _Block(nnx.Module):
  """x + attention(norm1(x)), then x + MLP(norm2(x)); branches compute in `dtype`."""

  def __init__(self, config: CLIPTextConfig, dtype: DTypeLike, rngs: nnx.Rngs):
    c = config
    linear = lambda cin, cout: nnx.Linear(cin, cout, dtype=dtype, rngs=rngs)
    self.config = config
    self.norm1, self.norm2 = _norm(c.width, rngs), _norm(c.width, rngs)
    self.q, self.k, self.v, self.out = (linear(c.width, c.width) for _ in range(4))
    self.fc1, self.fc2 = linear(c.width, c.hidden), linear(c.hidden, c.width)

  def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
    b, n, _ = x.shape
    y = self.norm1(x)
    q, k, v = (f(y).reshape(b, n, self.config.heads, -1) for f in (self.q, self.k, self.v))
    attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + self.out(attended.reshape(b, n, -1))
    return x + self.fc2(_ACTIVATIONS[self.config.activation](self.fc1(self.norm2(x))))


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
  return nnx.LayerNorm(width, epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


class CLIPText(nnx.Module):
  """Token ids to one vector a token.

  Args:
    config: its shape.
    dtype: of the branches; parameters, norms and the residual stream stay float32.
  """

  def __init__(self, config: CLIPTextConfig, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
    self.config = config
    normal = jax.nn.initializers.normal
    self.token_embedding = nnx.Param(normal(0.02)(rngs.params(), (config.vocabulary, config.width)))
    self.position_embedding = nnx.Param(normal(0.01)(rngs.params(), (config.context, config.width)))
    self.layers = nnx.List([_Block(config, dtype, rngs) for _ in range(config.layers)])
    self.final_norm = _norm(config.width, rngs)

  def __call__(self, ids: Int[Array, "b n"]) -> Float[Array, "b n c"]:
    """The last hidden state, float32, after the final norm; n is at most `config.context`.

    Causal: a token's vector depends on the tokens up to it. So what a text is padded with changes
    the vectors behind its end token alone.
    """
    x = self.token_embedding[...][ids] + self.position_embedding[: ids.shape[1]]
    for block in self.layers:
      x = block(x)
    return self.final_norm(x)
