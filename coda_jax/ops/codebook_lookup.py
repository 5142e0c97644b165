r"""Codebook look-ups that never hold tokens x codes.

With s = q kᵀ / √D, p = softmax(s), P = softmax(s/τ), N tokens and p̄ = mean_n P_n:

  ids  = argmax s (first of equals)              z = v[ids], its gradient to s through Σ_j p_j v_j
  L_e  = mean_n H_n − H̄,   H_n = −Σ_j P_nj log P_nj,   H̄ = −Σ_j p̄_j log(p̄_j + ε),  ε = 1e-5

Chunks of tokens are scanned, each against the whole codebook. Every logit is computed once forward
and once backward (on CPUs twice), and only chunk x codes logits exist. The forward pass saves for
each token the largest logit m, log Σ exp((s−m)/τ) and H_n, and for each code p̄. The backward pass
recomputes s. With g the cotangent of z, ge that of L_e, c_n = ⟨g_n, Σ_j p_nj v_j⟩,
a_j = log(p̄_j+ε) + p̄_j/(p̄_j+ε) and E_n = Σ_j P_nj a_j:

  ds = p∘(g vᵀ − c) + ge/(Nτ)·P∘[(a − E) − (log P + H)],   dq = ds k/√D,  dk = dsᵀ q/√D,
  dv[ids] += g + g_hard.

Three things depend on the platform, and are chosen when a program is lowered:
- CPUs take shorter chunks, which stay in the cache. Their backward pass scans tiles of codes too,
  since products with few rows are slow; a first scan takes the row sums c and E.
- CPUs find the maximum of a row by blocks (`_first_max`).
- TPUs multiply with one-hot rows for `v[ids]` and `dv[ids] +=`, which is exact. Gather and scatter
  would want codes along the first axis, where a TPU pads 16 channels to 128.

Each device looks its own tokens up in its own codes (`ops.sharded`). Maxima and sums over codes of
other devices are exchanged after a pass over all chunks, never within it. Where codes lie over
several devices, p̄ and the row sums c and E take a pass of their own, since they need these sums.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as Spec
from jaxtyping import Array, Float, Int

from coda_jax.ops.chunks import Chunks
from coda_jax.ops.sharded import Layout

_EPS = 1e-5
# Logits of a chunk on each device, if no chunk size is given.
_ELEMENTS = 2**22
_CPU_ELEMENTS = 2**19
_CPU_TILE = 2**12  # codes
_CPU_TILE_ELEMENTS = 2**21
_BLOCK = 512  # codes whose maximum is taken together
_dot = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


class Lookup(NamedTuple):
  """Result of `attention_lookup`: codes, their values and the entropy loss L_e (scalar, nats).

  `k` and `v` are the arguments. A further look-up that takes these adds its gradients to the same
  arrays; otherwise the gradients of every look-up are held and summed at the end.
  """

  ids: Int[Array, "n"]
  z: Float[Array, "n c"]  # straight-through: the gradient reaches q and k by softmax, v by the id
  z_hard: Float[Array, "n c"]  # the same values; the gradient reaches v alone
  entropy_loss: Float[Array, ""]
  k: Float[Array, "v d"]
  v: Float[Array, "v c"]


def attention_ids(
  q: Float[Array, "n d"], k: Float[Array, "v d"], *, chunk_size: int | None = None
) -> Int[Array, "n"]:
  """Ids [n] int32 of the codes with the largest q kᵀ; `chunk_size` tokens at a time."""
  q, k = _float32(q, k)
  return _largest(q, k, None, chunk_size)


def euclidean_lookup(
  x: Float[Array, "n c"], codebook: Float[Array, "v c"], *, chunk_size: int | None = None
) -> Int[Array, "n"]:
  """Ids [n] int32 of the nearest codes, without gradient; `chunk_size` tokens at a time."""
  x, codebook = _float32(*map(jax.lax.stop_gradient, (x, codebook)))
  half_norms = 0.5 * jnp.sum(codebook**2, 1)  # argmin |x − c|² = argmax ⟨x, c⟩ − |c|²/2
  return _largest(x, codebook, -half_norms, chunk_size)


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
  if scale is None:
    scale = 1 / math.sqrt(q.shape[1])
  # Codes lie along the last axis: along the first a TPU would pad 16 or 32 channels to 128.
  ids, z, z_hard, entropy_loss, k, v = _lookup(chunk_size, temperature, q * scale, k.T, v.T)
  return Lookup(ids, z, z_hard, entropy_loss, k.T, v.T)


def code_values(values: Float[Array, "v c"], ids: Int[Array, "*s"]) -> Float[Array, "*s c"]:
  """`values[ids]` with its gradient; codes may lie over several devices. Meant for few channels."""
  (values,), ids = _float32(values), jnp.asarray(ids)
  return _taken(values.T, ids.reshape(-1)).reshape(*ids.shape, -1)


def _float32(*xs: jax.Array) -> tuple[jax.Array, ...]:
  return tuple(x.astype(jnp.float32) for x in xs)


def _cpu_or_not(function, *args):
  """`function(cpu, *args)`, where `cpu` tells whether the program is lowered for CPUs."""
  cpu, default = (functools.partial(function, cpu) for cpu in (True, False))
  return jax.lax.platform_dependent(*args, cpu=cpu, default=default)


def _chunks(cpu: bool, x: jax.Array, codes: int, size: int | None) -> Chunks:
  return Chunks(x, size or (_CPU_ELEMENTS if cpu else _ELEMENTS) // codes)


def _first_max(cpu: bool, x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Largest element of every row and its index, the first of equals (int32).

  XLA's CPU compiler vectorises no argmax. It vectorises maxima of blocks, after which one block of
  each row is left to search: the whole forward pass takes half the time.
  """
  if not cpu:
    return jnp.max(x, 1), jnp.argmax(x, 1).astype(jnp.int32)
  n, v = x.shape
  width = min(v, _BLOCK)
  blocks = jnp.pad(x, ((0, 0), (0, -v % width)), constant_values=-jnp.inf).reshape(n, -1, width)
  maxima = jnp.max(blocks, 2)
  block = jnp.argmax(maxima, 1)
  within = jnp.argmax(jnp.take_along_axis(blocks, block[:, None, None], 1)[:, 0], 1)
  return jnp.max(maxima, 1), (block * width + within).astype(jnp.int32)


def _largest(q: jax.Array, k: jax.Array, offset: jax.Array | None, size: int | None) -> jax.Array:
  """argmax of q kᵀ + offset, `size` tokens at a time."""
  offset = jnp.zeros(len(k)) if offset is None else offset
  layout = Layout(q, len(k))

  def search(q, k, offset):
    def local(cpu, q, k, offset):
      chunk = lambda q: _first_max(cpu, _dot(q, k.T) + offset)
      return _chunks(cpu, q, len(k), size).map(chunk, q)

    largest, ids = _cpu_or_not(local, q, k, offset)
    return layout.largest(largest, ids, len(k))[1]

  tokens, codes = Spec(layout.tokens), Spec(layout.codes)
  return layout.run(search, (q, k, offset), (tokens, codes, codes), tokens)


def _lookup_fwd(size, tau, q, k, v):
  n, layout = len(q), Layout(q, k.shape[1])

  def forward(q, k, v):
    several, codes = layout.codes is not None, k.shape[1]
    weight = jnp.full(len(q), 1 / n)
    sums = functools.partial(_sums, size, tau, several)
    (ids, largest, total, weighted), p_mean = _cpu_or_not(sums, q, k, weight)
    m, ids = layout.largest(largest, ids, codes)
    if several:  # sums were taken relative to the largest logit of this device's codes
      moved = (largest - m) * (1 / tau)
      total, weighted = total * jnp.exp(moved), (weighted + moved * total) * jnp.exp(moved)
      total, weighted = layout.sum_codes((total, weighted))
    log_total = jnp.log(total)
    if several:
      means = functools.partial(_mean_probabilities, size, tau)
      p_mean = _cpu_or_not(means, q, k, weight, m, log_total)
    p_mean = layout.sum_tokens(p_mean)
    z = layout.sum_codes(_rows(v, ids - layout.first_code(codes), size))
    return ids, m, log_total, log_total - weighted / total, p_mean, z

  tokens, codes = Spec(layout.tokens), Spec(None, layout.codes)
  out_specs = (*[tokens] * 4, Spec(layout.codes), tokens)
  *stats, p_mean, z = layout.run(forward, (q, k, v), (tokens, codes, codes), out_specs)
  ids, *_, entropy = stats
  entropy_loss = jnp.mean(entropy) + jnp.sum(p_mean * jnp.log(p_mean + _EPS))
  return (ids, z, z, entropy_loss, k, v), (q, k, v, *stats, p_mean)


def _sums(size, tau, several, cpu, q, k, weight):
  """((argmax, m, Σ w, Σ w x) of every token, Σ_n weight_n P_n), x = (s − m)/τ and w = exp x.

  If other devices have further codes, the P_n wait for their sums: the last result is 0.
  """
  chunks = _chunks(cpu, q, k.shape[1], size)

  def chunk(p_mean, x):
    q, weight = x
    s = _dot(q, k)
    m, ids = _first_max(cpu, s)
    x = (s - m[:, None]) * (1 / tau)
    w = jnp.exp(x)
    total = _dot(w, jnp.ones(k.shape[1]))
    if not several:
      p_mean += _dot(weight / total, w)
    return p_mean, (ids, m, total, jnp.sum(w * x, 1))

  xs = chunks.split(q), chunks.split(weight)  # the weight of a chunk's padding is 0
  p_mean, stats = jax.lax.scan(chunk, jnp.zeros(k.shape[1]), xs)
  return tuple(map(chunks.join, stats)), p_mean


def _mean_probabilities(size, tau, cpu, q, k, weight, m, log_total):
  """Σ_n weight_n P_n of every code."""
  chunks = _chunks(cpu, q, k.shape[1], size)

  def chunk(p_mean, x):
    q, weight, m, log_total = x
    _, p, _ = _exponentials(tau, q, m[:, None], log_total[:, None], k)
    return p_mean + _dot(weight, p), None

  xs = tuple(map(chunks.split, (q, weight, m, log_total)))
  return jax.lax.scan(chunk, jnp.zeros(k.shape[1]), xs)[0]


def _one_hot(ids: jax.Array, codes: int) -> jax.Array:
  return (ids[:, None] == jnp.arange(codes)).astype(jnp.float32)


def _rows(v: jax.Array, ids: jax.Array, size: int | None) -> jax.Array:
  """Values [n, c] of codes, 0 for ids of other devices' codes; v is [c, codes]."""

  def products(v, ids):
    codes = v.shape[1]
    return _chunks(False, ids, codes, size).map(lambda ids: _dot(_one_hot(ids, codes), v.T), ids)

  def gather(v, ids):
    known = (ids >= 0) & (ids < v.shape[1])
    return jnp.where(known[:, None], v[:, jnp.where(known, ids, 0)].T, 0.0)

  return jax.lax.platform_dependent(v, ids, tpu=products, default=gather)


def _add_rows(dv: jax.Array, ids: jax.Array, g: jax.Array, size: int | None) -> jax.Array:
  """dv [c, codes] with g [n, c] added at the ids, but for those of other devices' codes."""

  def products(dv, ids, g):
    chunks = _chunks(False, ids, dv.shape[1], size)
    add = lambda dv, x: (dv + _dot(x[1].T, _one_hot(x[0], dv.shape[1])), None)
    return jax.lax.scan(add, dv, (chunks.split(ids), chunks.split(g)))[0]

  def scatter(dv, ids, g):
    ids = jnp.where(ids < 0, dv.shape[1], ids)  # a negative index would count from the end
    return dv.at[:, ids].add(g.T, mode="drop")

  return jax.lax.platform_dependent(dv, ids, g, tpu=products, default=scatter)


def _lookup_bwd(size, tau, residuals, cotangents):
  q, k, v, ids, m, log_total, entropy, p_mean = residuals
  _, g, g_hard, ge, dk, dv = cotangents
  layout = Layout(q, k.shape[1])
  a = jnp.log(p_mean + _EPS) + p_mean / (p_mean + _EPS)
  ge = jnp.full(len(q), ge / (len(q) * tau))
  tokens = q, g, *(x[:, None] for x in (m, log_total, entropy, ge))

  def backward(tokens, codes, dk, dv, ids, g):
    several = layout.token_shards > 1
    # Other devices add to the same gradients, so what is given is added once, at the end.
    start_k, start_v = (jnp.zeros_like(x) if several else x for x in (dk, dv))
    sums = None
    if layout.codes:
      row_sums = functools.partial(_local_row_sums, size, tau)
      sums = layout.sum_codes(_cpu_or_not(row_sums, tokens, codes))
    gradients = functools.partial(_gradients, size, tau)
    new_k, dq = _cpu_or_not(gradients, tokens, codes, start_k, sums)
    new_v = _add_rows(start_v, ids - layout.first_code(dv.shape[1]), g, size)
    if several:
      new_k, new_v = layout.sum_tokens((new_k, new_v))
      new_k, new_v = dk + new_k, dv + new_v
    return layout.sum_codes(dq), new_k, new_v

  t, c = Spec(layout.tokens), Spec(None, layout.codes)
  args = tokens, (k, v, a[None]), dk, dv, ids, g + g_hard
  return layout.run(backward, args, (t, c, c, c, t, t), (t, c, c))


def _local_row_sums(size, tau, cpu, tokens, codes):
  """`_row_sums` over this device's codes."""
  chunks = _chunks(cpu, tokens[0], codes[0].shape[1], size)
  sums = _row_sums(tau, tuple(map(chunks.split, tokens)), codes)
  return tuple(map(chunks.join, sums))


def _gradients(size, tau, cpu, tokens, codes, dk, sums):
  """(dk with ds's part added, dq); `sums` are the `_row_sums` over all codes, if they are known."""
  q, k = tokens[0], codes[0]
  tile = _tile(q, k.shape[1]) if cpu else k.shape[1]
  chunks = Chunks(q, size or (_CPU_TILE_ELEMENTS if cpu else _ELEMENTS) // tile)
  tokens = tuple(map(chunks.split, tokens))
  sums = sums and tuple(map(chunks.split, sums))
  add = functools.partial(_add_gradients, tau, tokens)
  if tile == k.shape[1]:
    dk, dq = add(codes, dk, sums)
    return dk, chunks.join(dq)

  def take(x, i):
    return jax.lax.dynamic_slice_in_dim(x, i * tile, tile, 1)

  def add_sums(i, sums):
    more = _row_sums(tau, tokens, [take(x, i) for x in codes])
    return jax.tree.map(jnp.add, sums, more)

  def add_tile(i, x):
    dk, dq = x
    new, more = add([take(x, i) for x in codes], take(dk, i), sums)
    return jax.lax.dynamic_update_slice_in_dim(dk, new, i * tile, 1), dq + more

  if sums is None:
    rows = tokens[0].shape[:2]
    zeros = jnp.zeros((*rows, len(codes[1]) + 1)), jnp.zeros((*rows, 1))
    sums = jax.lax.fori_loop(0, k.shape[1] // tile, add_sums, zeros)
  start = dk, jnp.zeros(tokens[0].shape)
  dk, dq = jax.lax.fori_loop(0, k.shape[1] // tile, add_tile, start)
  return dk, chunks.join(dq)


def _tile(q: jax.Array, codes: int) -> int:
  """Codes that a CPU's backward pass takes at a time: a divisor of their number."""
  tile = math.gcd(codes, _CPU_TILE)
  small = len(q) * codes <= _CPU_ELEMENTS or 8 * tile < _CPU_TILE
  return codes if small else tile


def _exponentials(tau, q, m, log_total, k):
  """exp(s − m), P and log P of a chunk."""
  x = _dot(q, k) - m
  log_p = x * (1 / tau) - log_total  # no division: it takes CPUs as long as an exponential
  return jnp.exp(x), jnp.exp(log_p), log_p


def _row_sums(tau, tokens, codes):
  """Σ_j e_j [v_j, 1] and Σ_j P_j a_j of every token over some codes, with e = exp(s − m)."""
  k, v, a = codes
  v_and_one = jnp.concatenate([v, jnp.ones_like(a)]).T

  def chunk(x):
    q, _, m, log_total, *_ = x
    e, p, _ = _exponentials(tau, q, m, log_total, k)
    return _dot(e, v_and_one), _dot(p, a.T)

  return jax.lax.map(chunk, tokens)


def _add_gradients(tau, tokens, codes, dk, sums):
  """(dk with ds's part added, dq) of some codes; of all codes if `sums` of the rows is None."""
  k, v, a = codes

  def chunk(dk, x):
    (q, g, m, log_total, entropy, ge), sums = x
    e, p, log_p = _exponentials(tau, q, m, log_total, k)
    gv = _dot(g, v)
    if sums is None:
      total, mean_a = _dot(e, jnp.ones_like(a).T), _dot(p, a.T)
      c = jnp.sum(e * gv, 1, keepdims=True) / total
    else:
      soft, mean_a = sums
      total = jnp.where(soft[:, -1:] == 0, 1.0, soft[:, -1:])  # of a chunk's padding
      c = jnp.sum(g * soft[:, :-1], 1, keepdims=True) / total
    ds = e * ((gv - c) * (1 / total)) + ge * p * ((a - mean_a) - (log_p + entropy))
    return dk + _dot(q.T, ds), _dot(ds, k.T)

  return jax.lax.scan(chunk, dk, (tokens, sums))


def _lookup_alone(size, tau, q, k, v) -> tuple[jax.Array, ...]:
  return _lookup_fwd(size, tau, q, k, v)[0]


_lookup = jax.custom_vjp(_lookup_alone, nondiff_argnums=(0, 1))
_lookup.defvjp(_lookup_fwd, _lookup_bwd)


def _taken_fwd(v, ids):
  layout = Layout(ids, v.shape[1])

  def take(v, ids):
    return layout.sum_codes(_rows(v, ids - layout.first_code(v.shape[1]), None))

  tokens, codes = Spec(layout.tokens), Spec(None, layout.codes)
  return layout.run(take, (v, ids), (codes, tokens), tokens), (v, ids)


def _taken_bwd(residuals, g):
  v, ids = residuals
  layout = Layout(ids, v.shape[1])

  def add(ids, g):
    dv = jnp.zeros((v.shape[0], codes_here), v.dtype)
    return layout.sum_tokens(_add_rows(dv, ids - layout.first_code(codes_here), g, None))

  codes_here = v.shape[1] // layout.code_shards
  tokens, codes = Spec(layout.tokens), Spec(None, layout.codes)
  return layout.run(add, (ids, g), (tokens, tokens), codes), None


def _taken_alone(v, ids) -> jax.Array:
  return _taken_fwd(v, ids)[0]


_taken = jax.custom_vjp(_taken_alone)
_taken.defvjp(_taken_fwd, _taken_bwd)
