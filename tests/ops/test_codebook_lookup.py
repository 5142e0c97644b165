"""The streamed look-ups against the same mathematics materialised, and what they must not hold."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from coda_jax import sharding
from coda_jax.config import MeshSettings
from coda_jax.ops import codebook_lookup
from coda_jax.ops.codebook_lookup import attention_ids, attention_lookup, euclidean_lookup
from tests.collectives import collectives
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("optimized")

TAU = 0.01


def materialised(q, k, v, tau=TAU):
  """Equations of the module's docstring, straight down; gradients by autodiff."""
  s = q @ k.T / q.shape[1] ** 0.5
  ids = jnp.argmax(s, 1)
  p = jax.nn.softmax(s)
  hard = jax.nn.one_hot(ids, len(k))
  z = (jax.lax.stop_gradient(hard - p) + p) @ jax.lax.stop_gradient(v)
  z_hard = hard @ v
  z = z + z_hard - jax.lax.stop_gradient(z_hard)  # v's gradient through the hard choice
  log_p = jax.nn.log_softmax(s / tau)
  entropy = -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, 1))
  p_mean = jnp.mean(jnp.exp(log_p), 0)
  return ids, z, z_hard, entropy + jnp.sum(p_mean * jnp.log(p_mean + 1e-5))


def inputs(n, codes, d=32, c=16, seed=0):
  """RMS-normed queries and keys, values, and cotangents of z and z_hard."""
  keys = jax.random.split(jax.random.key(seed), 5)
  q, k = (jax.random.normal(key, (m, d)) for key, m in zip(keys, (n, codes), strict=False))
  q, k = (x / jnp.sqrt(jnp.mean(x**2, 1, keepdims=True)) for x in (q, k))
  v = jax.random.normal(keys[2], (codes, c))
  return (q, k, v), tuple(jax.random.normal(key, (n, c)) for key in keys[3:])


def value_and_grad(lookup, cotangents):
  """Jitted (outputs, gradients of q, k, v) for one scalar that all outputs enter."""

  def loss(q, k, v):
    out = lookup(q, k, v)
    g, g_hard = cotangents
    return jnp.sum(g * out[1]) + jnp.sum(g_hard * out[2]) + 3.0 * out[3], out

  return jax.jit(lambda *x: jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(*x))


def assert_equal(ours, reference, rtol=1e-4):
  ((_, out), grads), ((_, ref), ref_grads) = ours, reference
  np.testing.assert_array_equal(out[0], ref[0])
  for name, a, b in zip(("z", "z_hard"), out[1:3], ref[1:3], strict=True):
    assert_close(a, b, 1e-6, name)
  np.testing.assert_allclose(out[3], ref[3], rtol=1e-5, atol=1e-6)  # a difference of two entropies
  for name, a, b in zip("qkv", grads, ref_grads, strict=True):
    assert_close(a, b, rtol, f"gradient of {name}")


@pytest.mark.parametrize(
  ("n", "codes", "chunk_size"),
  [
    (1, 5, None),
    pytest.param(64, 256, 16, marks=pytest.mark.slow),
    (50, 300, 16),
    pytest.param(37, 1000, 8, marks=pytest.mark.slow),
    pytest.param(169, 4096, None, marks=pytest.mark.slow),
    (7, 64, 100),
  ],
)
def test_equals_materialised(n, codes, chunk_size):
  x, cotangents = inputs(n, codes)
  streamed = value_and_grad(lambda *x: attention_lookup(*x, chunk_size=chunk_size), cotangents)
  assert_equal(streamed(*x), value_and_grad(materialised, cotangents)(*x))
  np.testing.assert_array_equal(attention_ids(*x[:2], chunk_size=chunk_size), streamed(*x)[0][1][0])


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_forms_of_other_platforms(monkeypatch, platform):
  def choose(*args, default, **forms):
    return forms.get(platform, default)(*args)

  monkeypatch.setattr(jax.lax, "platform_dependent", choose)
  x, cotangents = inputs(37, 300)
  streamed = value_and_grad(lambda *x: attention_lookup(*x, chunk_size=8), cotangents)
  assert_equal(streamed(*x), value_and_grad(materialised, cotangents)(*x))
  ids = streamed(*x)[0][1][0]
  np.testing.assert_array_equal(attention_ids(*x[:2], chunk_size=8), ids)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_tiles_of_codes(monkeypatch, chunk_size):
  monkeypatch.setattr(codebook_lookup, "_CPU_TILE", 32)
  monkeypatch.setattr(codebook_lookup, "_CPU_ELEMENTS", 512)
  monkeypatch.setattr(codebook_lookup, "_CPU_TILE_ELEMENTS", 320)
  x, cotangents = inputs(37, 224)
  assert codebook_lookup._tile(x[0], 224) == 32 and codebook_lookup._tile(x[0], 225) == 225
  streamed = value_and_grad(lambda *x: attention_lookup(*x, chunk_size=chunk_size), cotangents)
  assert_equal(streamed(*x), value_and_grad(materialised, cotangents)(*x))


@pytest.mark.slow
def test_look_ups_that_pass_the_codes_on():
  (q, k, v), cotangents = inputs(40, 200)

  def passed_on(q, k, v):
    first = attention_lookup(q[:10], k, v, chunk_size=8)
    return first, attention_lookup(q[10:], first.k, first.v, chunk_size=8)

  def apart(q, k, v):
    return tuple(attention_lookup(x, k, v, chunk_size=8) for x in (q[:10], q[10:]))

  def gradients(lookups):
    def loss(*x):
      found = lookups(*x)
      z, z_hard = (jnp.concatenate(z) for z in zip(*(x[1:3] for x in found), strict=True))
      g, g_hard = cotangents
      return jnp.sum(g * z) + jnp.sum(g_hard * z_hard) + sum(x.entropy_loss for x in found)

    return jax.jit(jax.grad(loss, (0, 1, 2)))

  for ours, expected in zip(*(gradients(f)(q, k, v) for f in (passed_on, apart)), strict=True):
    assert_close(ours, expected, 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_temperature_and_large_logits(temperature):
  (q, k, v), cotangents = inputs(40, 200)
  x = 20 * q, k, v  # no norm: logits far outside exp's range
  ours = value_and_grad(
    lambda *x: attention_lookup(*x, temperature=temperature, chunk_size=16), cotangents
  )
  assert_equal(ours(*x), value_and_grad(lambda *x: materialised(*x, temperature), cotangents)(*x))


@pytest.mark.slow
def test_each_cotangent_alone():
  x, (g, _) = inputs(20, 100)
  for i in (1, 2):
    grads = [
      jax.jit(jax.grad(lambda *x, f=f, i=i: jnp.sum(g * f(*x)[i]), (0, 1, 2)))(*x)
      for f in (lambda *x: attention_lookup(*x, chunk_size=8), materialised)
    ]
    for a, b in zip(*grads, strict=True):
      assert_close(a, b, 1e-5)


def test_ties_take_the_first_code():
  (q, k, v), _ = inputs(30, 40)
  k = jnp.concatenate([k, k])
  v = jnp.concatenate([v, v])
  first = np.argmax(np.asarray(q @ k[:40].T), 1)
  np.testing.assert_array_equal(attention_lookup(q, k, v, chunk_size=8).ids, first)
  np.testing.assert_array_equal(attention_ids(q, k, chunk_size=8), first)
  np.testing.assert_array_equal(
    euclidean_lookup(v[:9], v, chunk_size=4), np.arange(9), "a code is nearest to itself"
  )


@pytest.mark.parametrize(("n", "codes", "chunk_size"), [(1, 3, None), (50, 301, 16), (64, 64, 16)])
def test_euclidean(n, codes, chunk_size):
  _, k, x = inputs(codes, codes, c=16)[0]
  x, codebook = x[:n] * 2, k[:, :16]
  distance = ((np.asarray(x, np.float64)[:, None] - np.asarray(codebook)) ** 2).sum(-1)
  ids = euclidean_lookup(x, codebook, chunk_size=chunk_size)
  assert ids.dtype == jnp.int32
  np.testing.assert_array_equal(ids, distance.argmin(1))


@pytest.mark.slow
def test_bfloat16_inputs_are_looked_up_in_float32():
  x, _ = inputs(16, 64)
  x = tuple(y.astype(jnp.bfloat16) for y in x)
  out = attention_lookup(*x)
  ref = attention_lookup(*(y.astype(jnp.float32) for y in x))
  assert out.z.dtype == jnp.float32
  for a, b in zip(out, ref, strict=True):
    np.testing.assert_array_equal(a, b)
  grad = jax.grad(lambda q: attention_lookup(q, *x[1:]).entropy_loss)(x[0])
  assert grad.dtype == jnp.bfloat16


def test_tokens_by_codes_never_exists():
  n, codes, chunk = 96, 640, 8
  x, cotangents = inputs(n, codes)
  f = value_and_grad(lambda *x: attention_lookup(*x, chunk_size=chunk), cotangents)
  text = f.lower(*x).as_text() + f.lower(*x).compile().as_text()
  shapes = re.findall(r"(?:tensor<|f32\[|s32\[|pred\[)([\dx,]+)", text)
  sizes = {np.prod([int(y) for y in re.split("[x,]", s) if y]) for s in shapes}
  assert chunk * codes in sizes  # the pattern does see the buffers
  assert max(sizes) <= codes * 32


def place(axes, q, k, v):
  """The arrays on a mesh: tokens over data and fsdp if they divide them, codes over model."""
  mesh = sharding.make_mesh(MeshSettings(*axes))
  tokens = ("data", "fsdp") if len(q) % (axes[0] * axes[1]) == 0 else None
  specs = Spec(tokens), Spec("model"), Spec("model")
  return mesh, [
    jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip((q, k, v), specs, strict=True)
  ]


MESHES = [(8, 1, 1), (4, 1, 2), (2, 2, 2), (1, 1, 8)]


@pytest.mark.parametrize(
  ("axes", "n"),
  [
    *(pytest.param(m, 160, marks=pytest.mark.slow) for m in MESHES),
    pytest.param((8, 1, 1), 168, marks=pytest.mark.slow),
    ((4, 1, 2), 30),
  ],
)
def test_every_mesh_computes_the_same(axes, n):
  x, cotangents = inputs(n, 512)
  f = value_and_grad(lambda *x: attention_lookup(*x, chunk_size=6), cotangents)
  expected = f(*x)
  mesh, placed = place(axes, *x)
  with jax.set_mesh(mesh):
    assert_equal(f(*placed), expected, 1e-5)
    text = f.lower(*placed).compile().as_text()
    np.testing.assert_array_equal(attention_ids(*placed[:2], chunk_size=6), expected[0][1][0])
    ids = euclidean_lookup(placed[2][:160], placed[2])
    np.testing.assert_array_equal(ids, euclidean_lookup(x[2][:160], x[2]))
  # A device works on its own tokens and codes alone. What it tells others are sums.
  rows = {int(r) for r in re.findall(rf"f32\[(\d+),{512 // axes[2]}\]", text)}
  assert rows and max(rows) <= 32, rows
  found = collectives(text)
  assert found and not any(c.in_loop for c in found), found
  assert not any(c.kind == "all-gather" for c in found), found
  assert max(c.elements for c in found) <= max(n * 32, 512 * 32) // min(axes[2], 2)


def test_codes_that_the_mesh_does_not_divide():
  x, cotangents = inputs(48, 250)
  f = value_and_grad(lambda *x: attention_lookup(*x, chunk_size=6), cotangents)
  mesh, _ = place((4, 1, 2), *inputs(48, 256)[0])
  with jax.set_mesh(mesh):
    assert_equal(f(*x), f(*x), 1e-5)


@pytest.mark.slow
def test_ties_of_several_devices_take_the_first_code():
  (q, k, v), _ = inputs(32, 40)
  k = jnp.concatenate([k, k])
  v = jnp.concatenate([v, v])
  first = np.argmax(np.asarray(q @ k[:40].T), 1)
  mesh, (q, k, v) = place((4, 1, 2), q, k, v)
  with jax.set_mesh(mesh):
    np.testing.assert_array_equal(attention_lookup(q, k, v, chunk_size=3).ids, first)
    np.testing.assert_array_equal(attention_ids(q, k, chunk_size=3), first)
