r"""Softmax cross-entropy over a vocabulary that never holds tokens x codes.

With logits s = h tableᵀ + bias of one token, its label y, smoothing ε and V codes:

  loss = log Σ_j exp s_j − (1 − ε) s_y − ε/V Σ_j s_j
  ds_j = g (softmax(s)_j − (1 − ε)·[j = y] − ε/V),
  dh = ds table,  dtable = Σ_n ds_n hᵀ_n,  dbias = Σ_n ds_n

Chunks of tokens are scanned, each against the whole vocabulary. Every logit is computed once
forward and once backward, and only chunk x codes logits exist. The mean logit needs none of them:
it is h times the mean row of the table. Logits, their sums and the table's gradient are float32,
whatever the inputs are; products of bfloat16 inputs are exact.

Each device takes its own tokens and its own codes (`ops.sharded`); maxima and sums over other
devices are exchanged once, after all chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Bool, Float, Int

from coda_jax.ops.chunks import Chunks
from coda_jax.ops.sharded import Layout

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
  loss, correct = _streamed(chunk_size, label_smoothing, hidden, table, bias, labels)
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


def _chunks(size: int | None, hidden: jax.Array, codes: int) -> Chunks:
  return Chunks(hidden, size or _ELEMENTS // codes)


def _forward(size, smoothing, hidden, table, bias, labels):
  layout = Layout(hidden, len(table))

  def forward(hidden, table, bias, labels):
    def chunk(hidden, labels):
      s = _dot(hidden, table, (1, 1)) + bias
      largest = jnp.max(s, 1)
      chosen = jnp.sum(jnp.where(_is_label(labels, s.shape[1]), s, 0.0), 1)
      return largest, jnp.sum(jnp.exp(s - largest[:, None]), 1), chosen

    labels -= layout.first_code(len(table))
    found = _chunks(size, hidden, len(table)).map(chunk, hidden, labels)
    ours, total, chosen = found
    largest = layout.max_codes(ours)
    total, chosen = layout.sum_codes((total * jnp.exp(ours - largest), chosen))
    return largest + jnp.log(total), chosen, chosen == largest

  log_sum, chosen, correct = layout.run(
    forward, (hidden, table, bias, labels), _specs(layout), (Spec(layout.tokens),) * 3
  )
  out = log_sum - (1 - smoothing) * chosen, correct
  return out, (hidden, table, bias, labels, log_sum)


def _specs(layout: Layout) -> tuple[Spec, ...]:
  """Of hidden, table, bias and labels."""
  tokens, codes = Spec(layout.tokens), Spec(layout.codes)
  return tokens, codes, codes, tokens


def _is_label(labels: jax.Array, codes: int) -> jax.Array:
  return labels[:, None] == jax.lax.broadcasted_iota(labels.dtype, (1, codes), 1)


def _backward(size, smoothing, residuals, cotangents):
  hidden, table, bias, labels, log_sum = residuals
  g, _ = cotangents
  layout = Layout(hidden, len(table))

  def backward(hidden, table, bias, labels, log_sum, g):
    def chunk(sums, x):
      dtable, dbias = sums
      hidden, labels, log_sum, g = x
      s = _dot(hidden, table, (1, 1)) + bias
      p = jnp.exp(s - log_sum[:, None])
      ds = g[:, None] * (p - jnp.where(_is_label(labels, s.shape[1]), 1.0 - smoothing, 0.0))
      dbias += jnp.sum(ds, 0)
      ds = ds.astype(hidden.dtype)
      return (dtable + _dot(ds, hidden, (0, 0)), dbias), _dot(ds, table, (1, 0))

    labels -= layout.first_code(len(table))
    chunks = _chunks(size, hidden, len(table))
    zeros = jnp.zeros(table.shape, jnp.float32), jnp.zeros(bias.shape, jnp.float32)
    xs = tuple(map(chunks.split, (hidden, labels, log_sum, g)))
    sums, dhidden = jax.lax.scan(chunk, zeros, xs)
    return layout.sum_codes(chunks.join(dhidden)), layout.sum_tokens(sums)

  args = hidden, table, bias, labels, log_sum, g
  tokens, codes, *_ = specs = _specs(layout)
  dhidden, (dtable, dbias) = layout.run(
    backward, args, (*specs, tokens, tokens), (tokens, (codes, codes))
  )
  return dhidden.astype(hidden.dtype), dtable.astype(table.dtype), dbias, None


def _forward_alone(size, smoothing, hidden, table, bias, labels) -> tuple[jax.Array, jax.Array]:
  return _forward(size, smoothing, hidden, table, bias, labels)[0]


_streamed = jax.custom_vjp(_forward_alone, nondiff_argnums=(0, 1))
_streamed.defvjp(_forward, _backward)
