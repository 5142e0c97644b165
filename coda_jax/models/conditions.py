"""What a MaskGIT is told about the image: its class, or a text.

A condition is a module of three methods; training and sampling know no others.

- `condition(x)`: the vectors [B, T, width] that stand in front of the image's tokens;
- `condition.null(x)`: the condition that stands for none, for as many images as x;
- `condition.drop(x, mask)`: x, but `null` where the mask says so.
"""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from coda_jax.errors import UserError

_normal = nnx.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class TextShape:
  """Shape of a text's embedding.

  Attributes:
    tokens: vectors T of a text.
    width: numbers D of a vector: the text encoder's.
  """

  tokens: int = 77
  width: int = 768

  def __post_init__(self):
    if self.tokens < 1 or self.width < 1:
      raise UserError(f"model.text: {self.tokens} vectors of {self.width} are no text's embedding")


class ClassCondition(nnx.Module):
  """Class ids [B] to one vector each; the last of the `classes` stands for none."""

  def __init__(self, classes: int, width: int, rngs: nnx.Rngs):
    self.embedding = nnx.Param(_normal(rngs.params(), (classes, width)))

  def __call__(self, condition: Int[Array, "b"]) -> Float[Array, "b t c"]:
    return self.embedding[...][condition][:, None]

  def null(self, condition: Int[Array, "b"]) -> Int[Array, "b"]:
    """The null class, once an image."""
    return jnp.full_like(condition, len(self.embedding[...]) - 1)

  def drop(self, condition: Int[Array, "b"], mask: Bool[Array, "b"]) -> Int[Array, "b"]:
    """The null class where `mask` is set, and for an image without a class, -1."""
    return jnp.where(mask | (condition < 0), self.null(condition), condition)


class Empty(nnx.Variable):
  """The embedding [T, D] of the empty text: saved with the model, never trained."""


class TextCondition(nnx.Module):
  """Embeddings [B, T, D] of texts through one Linear, as in U-ViT (arXiv 2209.12152).

  They have no positions of their own here: those of a text encoder hold them already.

  Args:
    text: the shape of the embeddings.
    width: of the transformer.
    dtype: of the computation; the Linear's weights are float32.
  """

  def __init__(self, text: TextShape, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
    self.linear = nnx.Linear(text.width, width, dtype=dtype, kernel_init=_normal, rngs=rngs)
    self.empty = Empty(jnp.zeros((text.tokens, text.width)))

  def __call__(self, condition: Float[Array, "b t d"]) -> Float[Array, "b t c"]:
    return self.linear(condition)

  def null(self, condition: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
    """The embedding of the empty text, once an image."""
    return jnp.broadcast_to(self.empty[...], condition.shape).astype(condition.dtype)

  def drop(self, condition: Float[Array, "b t d"], mask: Bool[Array, "b"]) -> Float[Array, "b t d"]:
    """The embedding of the empty text where `mask` is set."""
    return jnp.where(mask[:, None, None], self.null(condition), condition)
