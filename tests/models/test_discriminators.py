"""The discriminators, against the official one and by hand."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from coda_jax.losses.adversarial import generator_loss, hinge_loss
from coda_jax.models import discriminators
from coda_jax.models.dino import DINO, dino_input
from coda_jax.models.discriminators import (
  TRAINABLE,
  BatchNorm,
  DinoDiscriminator,
  PatchDiscriminator,
  PowerIteration,
  SpectralConv,
)
from tests.conftest import assert_close
from tests.models.gates import Recorded, nearest_gradient
from tests.official_discriminator import discriminator, our_key


# One compilation each for all cases: they differ in the image's size alone.
@functools.partial(jax.jit, static_argnums=0)
def readouts(graphdef, state, x):
  return nnx.merge(graphdef, state).dino(x)


@functools.partial(jax.jit, static_argnums=0)
def readouts_transposed(graphdef, state, x, cotangents):
  return jax.vjp(lambda x: nnx.merge(graphdef, state).dino(x), x)[1](cotangents)[0]


@functools.partial(jax.jit, static_argnums=0)
def evaluation(graphdef, state, features):
  return nnx.merge(graphdef, state).logits(features, train=False)


@functools.partial(jax.jit, static_argnums=0)
def training(graphdef, state, features, offsets):
  """Gradient of the generator's loss for the features; inputs of the gates, logits, new heads."""

  def loss(features):
    net = nnx.merge(graphdef, state, copy=True)
    gates = Recorded(lambda x: jax.nn.leaky_relu(x, 0.2), offsets)
    with mock.patch.object(discriminators, "_leaky_relu", gates):
      logits = net.logits(features, train=True)
    return generator_loss(logits), (gates.inputs, logits, nnx.state(net.heads))

  return jax.grad(loss, has_aux=True)(features)


@pytest.mark.parity("discriminator")
def test_official_discriminator(golden):
  """Logits in both modes, gradient of the generator's loss, state after one training call."""
  out = golden.outputs()
  net = nnx.split(discriminator(golden))
  x, input_transposed = jax.vjp(dino_input, jnp.asarray(np.moveaxis(golden.input(), 1, -1)))
  features = readouts(*net, x)
  (name,) = (k for k in out if k.startswith("grad"))
  every = 8 if name == "grad_x_every_8th_pixel" else 1

  def gradient_and_inputs(offsets):
    cotangents, (inputs, *_) = training(*net, features, offsets)
    (gradient,) = input_transposed(readouts_transposed(*net, x, cotangents))
    return jnp.moveaxis(gradient, -1, 1)[..., ::every, ::every], inputs

  still = [np.zeros((len(x), 196, 384), np.float32)] * 10
  _, (_, logits, heads) = training(*net, features, still)
  assert_close(logits, out["logits_train"], 1e-4, "logits in training")
  flat = {"heads." + ".".join(map(str, k)): v[...] for k, v in nnx.to_flat_state(heads)}
  after = [k for k in out if k.startswith("after.")]
  assert after
  for k in after:
    assert_close(flat[our_key(k.removeprefix("after."))], out[k], 1e-4, k)
  # Stored u and v are random, so that sigma may be as small as the rounding of its sum, about 2e-8.
  sigmas = [
    n.v[...] @ n.kernel[...].reshape(len(n.v[...]), -1) @ n.u[...]
    for _, n in nnx.iter_graph(nnx.merge(*net).heads)
    if isinstance(n, SpectralConv)
  ]
  rtol = max(1e-4, 2e-8 / min(np.abs(sigmas)))
  assert_close(evaluation(*net, features), out["logits_eval"], rtol, "logits in evaluation")
  gradient = nearest_gradient(gradient_and_inputs, still, out[name], undecided=2e-6)
  assert_close(gradient, out[name], 1e-4, name)


def conv(size=3, channels=(4, 6), seed=0):
  return SpectralConv(*channels, size, rngs=nnx.Rngs(seed))


def test_spectral_conv_is_circular_and_has_norm_one():
  layer = conv()
  x = jax.random.normal(jax.random.key(1), (2, 10, 4))
  train = nnx.jit(lambda layer: layer(x, train=True))
  for _ in range(200):
    y = train(layer)
  kernel = layer.kernel[...] / np.linalg.norm(layer.kernel[...].reshape(12, 6), 2)
  expected = sum(jnp.roll(x, 1 - i, axis=1) @ kernel[i] for i in range(3))
  np.testing.assert_allclose(y, expected, atol=1e-5)
  u = layer.u[...]
  layer(x, train=False)
  assert np.array_equal(u, layer.u[...])


def test_spectral_conv_takes_its_gradient_through_the_kernel_alone():
  """d<G, W/s> with s = v W u, u and v fixed: G/s - <G, W>/s^2 v u."""
  layer = conv(size=1)
  x = jnp.eye(4)[None]  # the output is the normalised kernel
  g = jax.random.normal(jax.random.key(2), (1, 4, 6))
  graphdef, state = nnx.split(layer)

  def loss(kernel):
    net = nnx.merge(graphdef, state, copy=True)
    net.kernel[...] = kernel
    return jnp.sum(g * net(x, train=True)), (net.u[...], net.v[...])

  gradient, (u, v) = jax.grad(loss, has_aux=True)(layer.kernel[...])
  w = np.asarray(layer.kernel[0])
  s = v @ w @ u
  expected = g[0] / s - np.sum(g[0] * w) / s**2 * np.outer(v, u)
  np.testing.assert_allclose(gradient[0], expected, rtol=1e-4, atol=1e-3)


def test_batch_norm_statistics():
  layer = BatchNorm(3)
  x = jax.random.normal(jax.random.key(0), (4, 5, 3)) * 2 + 1
  y = layer(x, train=True)
  flat = np.asarray(x).reshape(-1, 3)
  np.testing.assert_allclose(
    y.reshape(-1, 3), (flat - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-6), atol=1e-5
  )
  np.testing.assert_allclose(layer.mean[...], 0.1 * flat.mean(0), rtol=1e-5)
  np.testing.assert_allclose(layer.var[...], 0.9 + 0.1 * flat.var(0, ddof=1), rtol=1e-5)
  y = layer(x, train=False)
  np.testing.assert_allclose(y, (x - layer.mean[...]) / jnp.sqrt(layer.var[...] + 1e-6), rtol=1e-5)


def test_batch_norm_is_over_the_global_batch():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  graphdef, state = nnx.split(BatchNorm(3))
  x = jax.random.normal(jax.random.key(0), (8, 5, 3)) * jnp.arange(1.0, 9)[:, None, None]

  @jax.jit
  def run(state, x):
    net = nnx.merge(graphdef, state, copy=True)
    return net(x, train=True), net.var[...]

  one = run(state, x)
  spread = run(state, jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
  for a, b in zip(one, spread, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_trains_and_what_is_state():
  net = nnx.eval_shape(lambda: DinoDiscriminator(DINO(), rngs=nnx.Rngs(0)))
  _, trained, vectors, statistics, frozen = nnx.split(
    net, TRAINABLE, PowerIteration, nnx.BatchStat, ...
  )
  per_head = 2 * (2 + 2) + 2
  assert len(nnx.to_flat_state(trained)) == 5 * per_head
  assert len(nnx.to_flat_state(vectors)) == 5 * 3 * 2
  assert len(nnx.to_flat_state(statistics)) == 5 * 2 * 2
  assert {path[0] for path, _ in nnx.to_flat_state(frozen)} == {"dino"}


def test_initial_heads():
  layer = conv(9, (64, 64))
  assert abs(float(jnp.std(layer.kernel[...])) - 0.02) < 1e-3
  for vector in layer.u, layer.v:
    np.testing.assert_allclose(jnp.linalg.norm(vector[...]), 1, rtol=1e-5)


@pytest.mark.slow
def test_patch_discriminator_learns_to_tell_noise_from_flat():
  net = PatchDiscriminator(width=8, layers=2, rngs=nnx.Rngs(0))
  graphdef, params, state = nnx.split(net, TRAINABLE, ...)
  real = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
  fake = jnp.zeros_like(real)
  optimizer = optax.adam(5e-3)

  @jax.jit
  def step(params, state, moments):
    def loss(params):
      net = nnx.merge(graphdef, params, state, copy=True)
      value = hinge_loss(net(real, train=True), net(fake, train=True))
      return value, nnx.state(net, nnx.Not(TRAINABLE))

    (value, state), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    updates, moments = optimizer.update(gradient, moments)
    return value, optax.apply_updates(params, updates), state, moments

  moments = optimizer.init(params)
  values = []
  for _ in range(30):
    value, params, state, moments = step(params, state, moments)
    values.append(float(value))
  assert values[0] > 0.9 and values[-1] < 0.1, values


def test_patch_discriminator_works_at_any_size():
  net = nnx.eval_shape(lambda: PatchDiscriminator(rngs=nnx.Rngs(0)))
  for h, w in ((64, 64), (128, 96)):
    x = jax.ShapeDtypeStruct((2, h, w, 3), jnp.float32)
    logits = jax.eval_shape(lambda net, x: net(x, train=False), net, x)
    assert logits.shape == (2, (h // 8 - 2) * (w // 8 - 2))
