"""Softmax attention, by the way that suits the platform."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from coda_jax.ops.platform import platform

IMPLEMENTATIONS = (None, "cudnn", "xla", "per_head")


def attention(
  q: Float[Array, "b t n h"],
  k: Float[Array, "b s n h"],
  v: Float[Array, "b s n h"],
  implementation: str | None = None,
) -> Float[Array, "b t n h"]:
  """softmax(q kᵀ / sqrt(h)) v for each image and head.

  Args:
    q, k, v: n heads of h channels.
    implementation: "cudnn" or "xla" of `jax.nn.dot_product_attention`; "per_head", one head after
      the other, whose scores then stay in a CPU's cache and are recomputed in the backward pass;
      None takes "per_head" on one CPU and leaves the choice to JAX elsewhere.
  """
  if implementation is None and platform() == "cpu":
    # Over several devices the loop would run over what is sharded.
    implementation = "per_head" if jax.sharding.get_abstract_mesh().size <= 1 else None
  if implementation != "per_head":
    return jax.nn.dot_product_attention(q, k, v, implementation=implementation)
  b, t, n, h = q.shape
  heads = [x.transpose(0, 2, 1, 3).reshape(b * n, -1, h) for x in (q * h**-0.5, k, v)]
  y = jax.lax.map(jax.checkpoint(_head), heads)
  return y.reshape(b, n, t, h).transpose(0, 2, 1, 3)


def _head(qkv):
  q, k, v = qkv
  scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
  return jax.nn.softmax(scores).astype(v.dtype) @ v
