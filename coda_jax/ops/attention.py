"""Softmax attention."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _per_head(q, k, v):
  """Scans the heads and recomputes their scores in the backward pass."""
  b, t, n, h = q.shape
  heads = [x.transpose(0, 2, 1, 3).reshape(b * n, -1, h) for x in (q * h**-0.5, k, v)]
  y = jax.lax.map(jax.checkpoint(_head), heads)
  return y.reshape(b, n, t, h).transpose(0, 2, 1, 3)


def _head(qkv):
  q, k, v = qkv
  scores = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
  return jax.nn.softmax(scores).astype(v.dtype) @ v


_ATTENTIONS = {
  "cudnn": functools.partial(jax.nn.dot_product_attention, implementation="cudnn"),
  "xla": functools.partial(jax.nn.dot_product_attention, implementation="xla"),
  "per_head": _per_head,
}
IMPLEMENTATIONS = (None, *_ATTENTIONS)


def attention(
  q: Float[Array, "b t n h"],
  k: Float[Array, "b s n h"],
  v: Float[Array, "b s n h"],
  implementation: str | None = None,
) -> Float[Array, "b t n h"]:
  """softmax(q kᵀ / sqrt(h)) v for each image and head.

  Args:
    q, k, v: n heads of h channels.
    implementation: "cudnn" or "xla" of `jax.nn.dot_product_attention`; "per_head", which scans the
      heads; None is "per_head" in programs for one CPU, whose cache holds the scores of one head
      (four times as fast at 681 tokens), and leaves the choice to JAX elsewhere.
  """
  if implementation is not None:
    return _ATTENTIONS[implementation](q, k, v)
  if jax.sharding.get_abstract_mesh().size > 1:  # a scan would run over what is sharded
    return jax.nn.dot_product_attention(q, k, v)
  default = jax.nn.dot_product_attention
  return jax.lax.platform_dependent(q, k, v, cpu=_per_head, default=default)
