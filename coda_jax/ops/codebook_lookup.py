r"""Codebook look-ups that never hold tokens x codes.

With s = q kᵀ / √D, p = softmax(s), P = softmax(s/τ), N tokens and p̄ = mean_n P_n:

  ids  = argmax s (first of equals)              z = v[ids], its gradient to s through Σ_j p_j v_j
  L_e  = mean_n H_n − H̄,   H_n = −Σ_j P_nj log P_nj,   H̄ = −Σ_j p̄_j log(p̄_j + ε),  ε = 1e-5

Tokens are taken a chunk at a time against the whole codebook, so that each logit is computed once
forward and once backward (on CPUs twice) and only chunk x codes of them exist. Forward keeps per
token the largest logit m, log Σ exp((s−m)/τ) and H_n, and sums p̄. Backward recomputes s and, with g
the cotangent of z and ge that of L_e, c_n = ⟨g_n, Σ_j p_nj v_j⟩, a_j = log(p̄_j+ε) + p̄_j/(p̄_j+ε),
E_n = Σ_j P_nj a_j:

  ds = p∘(g vᵀ − c) + ge/(Nτ)·P∘[(a − E) − (log P + H)],   dq = ds k/√D,  dk = dsᵀ q/√D,
  dv[ids] += g + g_hard.

On CPUs the backward pass cuts the codes into tiles too, so that everything between its products
stays in the cache; a first round over the tiles takes the row sums that ds needs.

On TPUs `v[ids]` and `dv[ids] +=` are products with chunks of one-hot rows, which are exact: gather
and scatter would need the codes along the first axis, padded to eight times their size.

Under `jit` tokens may be sharded over any mesh axes: chunks are cut within each device's share (the
mesh is the one set with `jax.set_mesh` or that of the arguments), means are over all tokens.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from coda_jax.ops.platform import platform

_EPS = 1e-5
# Logits alive at a time on each device, if no chunk size is given.
_ELEMENTS = 2**22
# CPUs: chunks stay in the cache; the backward pass cuts the codes too, its thin products want rows.
_CPU_ELEMENTS = 2**19
_CPU_TILE = 2**12
_CPU_TILE_ELEMENTS = 2**21
_BLOCK = 512  # codes whose maximum is taken together
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Lookup(NamedTuple):
  """Result of `attention_lookup`: codes, their values and the entropy loss L_e (scalar, nats).

  `k` and `v` are the arguments: a further look-up that takes these instead adds its gradients to
  the same arrays, where those of many look-ups would otherwise be held and summed at the end.
  """

  ids: Int[Array, "n"]
  z: Float[Array, "n c"]  # straight-through: the gradient reaches q and k by softmax, v by the id
  z_hard: Float[Array, "n c"]  # the same values; the gradient reaches v alone
  entropy_loss: Float[Array, ""]
  k: Float[Array, "v d"]
  v: Float[Array, "v c"]


class _Chunks:
  """How N tokens are cut into chunks that every device holds an equal part of."""

  def __init__(self, q: jax.Array, codes: int, size: int | None, elements: int | None = None):
    mesh = jax.typeof(q).sharding.mesh
    elements = elements or (_CPU_ELEMENTS if platform() == "cpu" else _ELEMENTS)
    self.n = q.shape[0]
    self.shards = math.gcd(self.n, math.prod(mesh.shape.values()))
    local = self.n // self.shards
    size = max(1, min(local, size or elements // codes))
    self.count = -(-local // size)
    self.size = -(-local // self.count)  # as even as can be

  def split(self, x: jax.Array) -> jax.Array:
    """[n, ...] to [count, shards * size, ...], zeros where a device's share ran out."""
    x = x.reshape(self.shards, -1, *x.shape[1:])
    pad = self.count * self.size - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    x = x.reshape(self.shards, self.count, self.size, *x.shape[2:]).swapaxes(0, 1)
    return x.reshape(self.count, -1, *x.shape[3:])

  def join(self, x: jax.Array) -> jax.Array:
    """Inverse of `split`."""
    x = x.reshape(self.count, self.shards, self.size, *x.shape[2:]).swapaxes(0, 1)
    x = x.reshape(self.shards, -1, *x.shape[3:])[:, : self.n // self.shards]
    return x.reshape(self.n, *x.shape[2:])

  def map(self, f, *xs: jax.Array) -> jax.Array:
    """`f` over the chunks of `xs`, joined."""
    ys = jax.lax.map(lambda x: f(*x), tuple(map(self.split, xs)))
    return jax.tree.map(self.join, ys)


def _row_dot(x: jax.Array, y: jax.Array) -> jax.Array:
  """Σ_j x_nj y_nj; CPUs are faster at products with one vector than at one of each row."""
  if platform() == "cpu":
    return _dot(x * y, jnp.ones(x.shape[1]))
  return jnp.einsum("nv,nv->n", x, y, precision=jax.lax.Precision.HIGHEST)


def _float32(*xs):
  return tuple(x.astype(jnp.float32) for x in xs)


def _first_max(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Largest element of every row and its index, the first of equals (int32).

  On CPUs `jnp.argmax` over long rows is no vector loop and takes ten times as long as an
  exponential; maxima of blocks are, and leave one block of each row to search.
  """
  if platform() != "cpu":
    return jnp.max(x, 1), jnp.argmax(x, 1).astype(jnp.int32)
  n, v = x.shape
  width = min(v, _BLOCK)
  blocks = jnp.pad(x, ((0, 0), (0, -v % width)), constant_values=-jnp.inf).reshape(n, -1, width)
  maxima = jnp.max(blocks, 2)
  block = jnp.argmax(maxima, 1)
  within = jnp.argmax(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], 1)
  return jnp.max(maxima, 1), (block * width + within).astype(jnp.int32)


def attention_ids(
  q: Float[Array, "n d"], k: Float[Array, "v d"], *, chunk_size: int | None = None
) -> Int[Array, "n"]:
  """Ids [n] int32 of the codes with the largest q kᵀ; `chunk_size` tokens at a time."""
  q, k = _float32(q, k)
  chunks = _Chunks(q, len(k), chunk_size)
  return chunks.map(lambda q: _first_max(_dot(q, k.T))[1], q)


def euclidean_lookup(
  x: Float[Array, "n c"], codebook: Float[Array, "v c"], *, chunk_size: int | None = None
) -> Int[Array, "n"]:
  """Ids [n] int32 of the nearest codes, without gradient; `chunk_size` tokens at a time."""
  x, codebook = _float32(*map(jax.lax.stop_gradient, (x, codebook)))
  half_norms = 0.5 * jnp.sum(codebook**2, 1)  # argmin |x − c|² = argmax ⟨x, c⟩ − |c|²/2
  chunks = _Chunks(x, len(codebook), chunk_size)

  def nearest(x):
    return _first_max(_dot(x, codebook.T) - half_norms)[1]

  return chunks.map(nearest, x)


def attention_lookup(
  q: Float[Array, "n d"],
  k: Float[Array, "v d"],
  v: Float[Array, "v c"],
  *,
  scale: float | None = None,
  temperature: float = 0.01,
  chunk_size: int | None = None,
) -> Lookup:
  """Attention look-up of n tokens in v codes (CODA, section 3.2), exact gradients to q, k and v.

  Args:
    q: queries, projected and normed.
    k: keys of the codes, projected and normed.
    v: values of the codes.
    scale: of q kᵀ; None is 1/√D.
    temperature: τ of the entropy loss.
    chunk_size: tokens (of each device) at a time; None chooses by the number of codes.
  """
  q, k, v = _float32(q, k, v)
  scale = q.shape[1] ** -0.5 if scale is None else scale
  tile = _tile(q, len(k))
  elements = _CPU_TILE_ELEMENTS if tile < len(k) else _ELEMENTS
  chunks = _Chunks(q, len(k), chunk_size), _Chunks(q, tile, chunk_size, elements)
  # Codes lie along the last axis: the other way round a TPU would pad 16 or 32 to 128.
  *found, k, v = _lookup(chunks, temperature, q * scale, k.T, v.T)
  return Lookup(*found, k.T, v.T)


def _tile(q: jax.Array, codes: int) -> int:
  """How many codes the backward pass takes at a time: a divisor of their number."""
  tile = math.gcd(codes, _CPU_TILE)
  one_device = math.prod(jax.typeof(q).sharding.mesh.shape.values()) == 1
  large = len(q) * codes > _CPU_ELEMENTS and 8 * tile >= _CPU_TILE
  return tile if platform() == "cpu" and one_device and large else codes


def _one_hot(ids: jax.Array, codes: int) -> jax.Array:
  return (ids[:, None] == jnp.arange(codes)).astype(jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lookup(chunks, tau, q, k, v):
  return _lookup_fwd(chunks, tau, q, k, v)[0]


def _lookup_fwd(chunks, tau, q, k, v):
  chunks, _ = chunks
  codes = k.shape[1]
  ones = jnp.ones(codes)

  def chunk(p_mean, x):
    q, weight = x
    s = _dot(q, k)
    m, ids = _first_max(s)
    x = (s - m[:, None]) * (1 / tau)
    w = jnp.exp(x)
    total = _dot(w, ones)
    log_total = jnp.log(total)
    entropy = log_total - _row_dot(w, x) / total
    p_mean += _dot(weight / total, w)
    z = _dot(_one_hot(ids, codes), v.T) if platform() == "tpu" else ()
    return p_mean, ((ids, m, log_total, entropy), z)

  weight = jnp.full((chunks.n,), 1 / chunks.n)  # 0 for the padding of a chunk
  xs = chunks.split(q), chunks.split(weight)
  p_mean, found = jax.lax.scan(chunk, jnp.zeros(codes), xs)
  stats, z = jax.tree.map(chunks.join, found)
  entropy_loss = jnp.mean(stats[-1]) + jnp.sum(p_mean * jnp.log(p_mean + _EPS))
  ids = stats[0]
  z = z if platform() == "tpu" else v[:, ids].T
  return (ids, z, z, entropy_loss, k, v), (q, k, v, *stats, p_mean)


def _lookup_bwd(chunks, tau, residuals, cotangents):
  _, chunks = chunks
  q, k, v, ids, m, log_total, entropy, p_mean = residuals
  _, g, g_hard, ge, dk, dv = cotangents
  a = jnp.log(p_mean + _EPS) + p_mean / (p_mean + _EPS)
  ge = jnp.full((chunks.n,), ge / (chunks.n * tau))
  columns = (x[:, None] for x in (m, log_total, entropy, ge))
  tokens = tuple(map(chunks.split, (q, g, *columns)))
  tile = _tile(q, k.shape[1])

  def exponentials(q, m, log_total, k):
    x = _dot(q, k) - m
    log_p = x * (1 / tau) - log_total  # no division: it takes CPUs as long as an exponential
    return jnp.exp(x), jnp.exp(log_p), log_p

  def row_sums(sums, codes):
    """Adds a tile's [Σ e v, Σ e] and Σ P a of every token."""
    k, v, a = codes
    v_and_one = jnp.concatenate([v, jnp.ones_like(a)]).T

    def chunk(x):
      q, _, m, log_total, *_ = x
      e, p, _ = exponentials(q, m, log_total, k)
      return _dot(e, v_and_one), _dot(p, a.T)

    return jax.tree.map(jnp.add, sums, jax.lax.map(chunk, tokens))

  def gradients(codes, dk, sums):
    """(dk, dq) of a tile; without `sums` it is all codes, and they are taken on the way."""
    k, v, a = codes

    def chunk(dk, x):
      (q, g, m, log_total, entropy, ge), sums = x
      e, p, log_p = exponentials(q, m, log_total, k)
      gv = _dot(g, v)
      if sums is None:
        total, mean_a = _dot(e, jnp.ones_like(a).T), _dot(p, a.T)
        c = _row_dot(e, gv)[:, None] / total
      else:
        soft, mean_a = sums
        total = soft[:, -1:]
        c = _row_dot(g, soft[:, :-1])[:, None] / total
      ds = e * ((gv - c) * (1 / total)) + ge * p * ((a - mean_a) - (log_p + entropy))
      return dk + _dot(q.T, ds), _dot(ds, k.T)

    return jax.lax.scan(chunk, dk, (tokens, sums))

  if tile == k.shape[1]:
    dk, dq = gradients((k, v, a[None]), dk, None)
  else:

    def take(x, i):
      return jax.lax.dynamic_slice_in_dim(x, i * tile, tile, 1)

    def codes(i):
      return take(k, i), take(v, i), take(a[None], i)

    rows = tokens[0].shape[:2]
    zeros = jnp.zeros((*rows, len(v) + 1)), jnp.zeros((*rows, 1))
    count = k.shape[1] // tile
    sums = jax.lax.fori_loop(0, count, lambda i, x: row_sums(x, codes(i)), zeros)

    def add(i, x):
      dk, dq = x
      new, more = gradients(codes(i), take(dk, i), sums)
      return jax.lax.dynamic_update_slice_in_dim(dk, new, i * tile, 1), dq + more

    dk, dq = jax.lax.fori_loop(0, count, add, (dk, jnp.zeros(tokens[0].shape)))
  if platform() == "tpu":
    add = lambda dv, x: (dv + _dot(x[1].T, _one_hot(x[0], dv.shape[1])), None)
    dv, _ = jax.lax.scan(add, dv, (chunks.split(ids), chunks.split(g + g_hard)))
  else:
    dv = dv.at[:, ids].add((g + g_hard).T)
  return chunks.join(dq), dk, dv


_lookup.defvjp(_lookup_fwd, _lookup_bwd)
