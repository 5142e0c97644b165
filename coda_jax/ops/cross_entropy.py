r"""Softmax cross-entropy over a vocabulary that never holds tokens x codes.

With logits s = h tableᵀ + bias of one token, its label y, smoothing ε and V codes:

  loss = log Σ_j exp s_j − (1 − ε) s_y − ε/V Σ_j s_j
  ds_j = g (softmax(s)_j − (1 − ε)·[j = y] − ε/V),
  dh = ds table,  dtable = Σ_n ds_n hᵀ_n,  dbias = Σ_n ds_n

Chunks of tokens are scanned, each against the whole vocabulary. Every logit is computed once
forward and once backward, and only chunk x codes logits exist. The mean logit needs none of them:
it is h times the mean row of the table. Logits, their sums and the table's gradient are float32,
whatever the inputs are; products of bfloat16 inputs are exact.

Under `jit` tokens may be sharded over any mesh axes and the vocabulary over another (`model`):
chunks are cut within each device's share, maxima and sums of a chunk are reduced over the codes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from coda_jax.ops.chunks import Chunks

# Logits of a chunk on each device. Every chunk reads the table and adds to its gradient, which
# costs more than the logits where chunks are short.
_ELEMENTS = 2**25


class CrossEntropy(NamedTuple):
  """Losses of the tokens in nats, and whether no code had a larger logit than the label."""

  loss: Float[Array, "n"]
  correct: Bool[Array, "n"]


def cross_entropy(
  hidden: Float[Array, "n d"],
  table: Float[Array, "v d"],
  bias: Float[Array, "v"],
  labels: Int[Array, "n"],
  *,
  weights: Float[Array, "n"] | None = None,
  label_smoothing: float = 0.0,
  chunk_size: int | None = None,
) -> CrossEntropy:
  """Cross-entropy of each token, exact gradients to hidden, table and bias.

  Args:
    hidden, table: of one float type; logits are hidden tableᵀ + bias.
    labels: codes, 0 to v - 1.
    weights: factors of the losses, constants; 1 by default.
    label_smoothing: part of the target spread evenly over all codes.
    chunk_size: tokens (of each device) at a time; None chooses by the number of codes.
  """
  table = table.astype(hidden.dtype)
  bias = bias.astype(jnp.float32)
  chunks = Chunks(hidden, chunk_size or _ELEMENTS // len(table))
  loss, correct = _streamed(chunks, label_smoothing, hidden, table, bias, labels)
  if label_smoothing:
    mean_row = table.astype(jnp.float32).mean(0)
    mean = jnp.matmul(hidden.astype(jnp.float32), mean_row, precision="highest") + bias.mean()
    loss -= label_smoothing * mean
  if weights is not None:
    loss *= jax.lax.stop_gradient(weights).astype(jnp.float32)
  return CrossEntropy(loss, correct)


def _dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Sums over one axis of x and of y, in float32: exact products, if x and y are bfloat16."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x,
    y,
    (((contract[0],), (contract[1],)), ((), ())),
    precision=precision,
    preferred_element_type=jnp.float32,
  )


def _forward(chunks, smoothing, hidden, table, bias, labels):
  def chunk(hidden, labels):
    s = _dot(hidden, table, (1, 1)) + bias
    largest = jnp.max(s, 1)
    # A sum over codes: to gather from a sharded axis would fetch all of it.
    chosen = jnp.sum(jnp.where(_is_label(labels, s.shape[1]), s, 0.0), 1)
    log_sum = largest + jnp.log(jnp.sum(jnp.exp(s - largest[:, None]), 1))
    return log_sum, chosen, chosen == largest

  xs = chunks.split(hidden), chunks.split(labels)
  found = jax.lax.map(lambda x: chunk(*x), xs)
  log_sum, chosen, correct = map(chunks.join, found)
  out = log_sum - (1 - smoothing) * chosen, correct
  return out, (hidden, table, bias, labels, log_sum)


def _is_label(labels: jax.Array, codes: int) -> jax.Array:
  return labels[:, None] == jax.lax.broadcasted_iota(labels.dtype, (1, codes), 1)


def _backward(chunks, smoothing, residuals, cotangents):
  hidden, table, bias, labels, log_sum = residuals
  g, _ = cotangents

  def chunk(sums, x):
    dtable, dbias = sums
    hidden, labels, log_sum, g = x
    s = _dot(hidden, table, (1, 1)) + bias
    p = jnp.exp(s - log_sum[:, None])
    ds = g[:, None] * (p - jnp.where(_is_label(labels, s.shape[1]), 1.0 - smoothing, 0.0))
    dbias += jnp.sum(ds, 0)
    ds = ds.astype(hidden.dtype)
    return (dtable + _dot(ds, hidden, (0, 0)), dbias), _dot(ds, table, (1, 0))

  zeros = jnp.zeros(table.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32)
  xs = tuple(map(chunks.split, (hidden, labels, log_sum, g)))
  (dtable, dbias), dhidden = jax.lax.scan(chunk, zeros, xs)
  dhidden = chunks.join(dhidden).astype(hidden.dtype)
  return dhidden, dtable.astype(table.dtype), dbias, None


def _forward_alone(chunks, smoothing, hidden, table, bias, labels) -> tuple[jax.Array, jax.Array]:
  return _forward(chunks, smoothing, hidden, table, bias, labels)[0]


_streamed = jax.custom_vjp(_forward_alone, nondiff_argnums=(0, 1))
_streamed.defvjp(_forward, _backward)
