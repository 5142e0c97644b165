"""A MaskGIT whose distribution is known: every position has its own, whatever the others hold."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from coda_jax.models.conditions import ClassCondition
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig

CONFIG = MaskGITConfig(
  width=2, depth=0, heads=1, num_classes=2, patch_sizes=(1, 2, 4), codebook_size=150
)


def logits(seed: int = 0, config: MaskGITConfig = CONFIG) -> np.ndarray:
  """[2, N, V]: of the classes, and of the null class."""
  rng = np.random.default_rng(seed)
  return rng.normal(0, 1.5, (2, config.tokens, config.codebook_size)).astype(np.float32)


class Oracle(MaskGIT):
  """Hidden states are one-hot positions, so that the output table is the distribution."""

  def __init__(self, values: np.ndarray, config: MaskGITConfig = CONFIG):
    self.config = config
    self.condition = ClassCondition(config.num_classes + 1, 1, nnx.Rngs(0))
    flat = values.reshape(-1, values.shape[-1])
    self.weights = nnx.Param(jnp.asarray(flat.T))

  def __call__(self, ids: jax.Array, condition: jax.Array) -> jax.Array:
    n = self.config.tokens
    null = (condition == self.config.null_class).astype(jnp.int32)
    hidden = jax.nn.one_hot(null[:, None] * n + jnp.arange(n), 2 * n)
    return hidden + 0 * ids[..., None]

  def output_table(self) -> tuple[jax.Array, jax.Array]:
    table = self.weights[...]
    return table, jnp.zeros(len(table))
