"""The objective with networks of a few numbers, worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays, weights
from coda_jax.config import AdversarialSettings, LossSettings
from coda_jax.errors import UserError
from coda_jax.losses.adversarial import adaptive_weight
from coda_jax.losses.reconstruction import reconstruction_loss
from coda_jax.models.discriminators import Discriminator
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.training.tokenizer_step import loss_and_gradients, networks, split_discriminator
from tests import tiny
from tests.training import runs

LOSSES = LossSettings(perceptual=0.0)


class _Head(nnx.Module):
  def __init__(self):
    self.gain, self.bias = nnx.Param(jnp.array(2.0)), nnx.Param(jnp.array(0.5))
    self.calls = nnx.BatchStat(jnp.zeros(()))

  def __call__(self, x):
    self.calls[...] += 1
    return self.gain[...] * x + self.bias[...]


class Linear(Discriminator):
  """One logit an image: 2 · mean + 0.5. Counts its calls."""

  def __init__(self):
    self.heads = nnx.List([_Head()])
    self.runs = 0

  def features(self, images, key=None):
    return (images.mean((1, 2, 3)),)

  def logits(self, features, *, train):
    return self.heads[0](features[0])[:, None]


@pytest.fixture(scope="module")
def tokenizer():
  return make_tokenizer(runs.LORA)


def make_tokenizer(lora):
  config = TokenizerConfig(runs.VAE, runs.QUANTIZER, lora, image_size=16)
  make = lambda: Tokenizer(config, rngs=nnx.Rngs(0))
  return weights.build(make, tiny.random_params(make), "test")


TRAINED = arrays.matching((("LoRAParam", ""), ("Param", "^quantizer")))


def outcome(tokenizer, schedule=0.5, layer="last", trained=TRAINED, **settings):
  _, params, frozen = arrays.split(tokenizer, trained, ...)
  discriminator = Linear()
  adversarial = AdversarialSettings(discriminator="patch", adaptive_layer=layer, **settings)
  structures = networks(tokenizer, None, discriminator, LOSSES, adversarial)
  heads, disc_frozen = split_discriminator(discriminator)
  return jax.jit(loss_and_gradients, static_argnums=0)(
    structures,
    params,
    heads,
    {"tokenizer": frozen, "discriminator": disc_frozen},
    tiny.images(2, 16, 16),
    jax.random.normal(jax.random.key(1), (2, 16, 16, 16)),
    jax.random.key(2),
    jnp.float32(schedule),
    jnp.zeros(()),
  )


@pytest.fixture(scope="module")
def own(tokenizer):
  return outcome(tokenizer)


@pytest.fixture(scope="module")
def official(tokenizer):
  return outcome(tokenizer, discriminator_gradient="official")


def test_total(own):
  m = own.metrics
  np.testing.assert_allclose(m["nll"], 0.2 * m["l1"] + m["mse"], rtol=1e-6)
  logits = 2 * own.reconstruction.mean((1, 2, 3)) + 0.5
  np.testing.assert_allclose(m["g_loss"], -logits.mean(), rtol=1e-5)
  total = m["nll"] + 0.5 * m["adaptive_weight"] * m["g_loss"] + m["vq_loss"]
  np.testing.assert_allclose(m["loss"], total + 0.05 * m["entropy_loss"], rtol=1e-5)
  assert own.variables["heads.0.calls"] == 3


MIDDLE = "decoder.mid.block_1.conv1"
LAYERS = {
  "last": "vae.decoder.up.0.block.0.conv2.lora_up",
  MIDDLE: "vae.decoder.mid.block_1.conv1.lora_up",
}


@pytest.mark.parametrize("layer", ["last", MIDDLE])
@pytest.mark.slow
def test_gradients_are_those_of_the_total(tokenizer, layer):
  """One backward pass of the whole total, with d held fixed, as plain jax would do it."""
  own = outcome(tokenizer, layer=layer)
  structure, params, frozen = arrays.split(tokenizer, TRAINED, ...)
  images = tiny.images(2, 16, 16)
  noise = jax.random.normal(jax.random.key(1), (2, 16, 16, 16))

  @jax.jit
  def gradients(params, d):
    def total(params, nll_weight, g_weight, rest):
      model = arrays.merge(structure, frozen, params)
      latents = model.vae.scale_latents(model.vae.encode(images).sample(noise=noise))
      out = model.quantizer(latents)
      image = model.vae.decode(model.vae.unscale_latents(out.latents))
      nll, _ = reconstruction_loss(image, images, LOSSES, None)
      g = -(2 * image.mean((1, 2, 3)) + 0.5).mean()
      return nll_weight * nll + g_weight * g + rest * (out.vq_loss + 0.05 * out.entropy_loss)

    gradient = jax.grad(total)
    return (
      gradient(params, 1.0, 0.5 * d, 1.0),
      gradient(params, 1.0, 0, 0),
      gradient(params, 0, 1.0, 0),
    )

  d = own.metrics["adaptive_weight"]
  expected, of_nll, of_g = gradients(params, d)
  largest = max(float(jnp.abs(x).max()) for x in expected.values())
  for name, x in expected.items():
    np.testing.assert_allclose(own.gradients[name], x, atol=1e-5 * largest, err_msg=name)
  weight = LAYERS[layer]
  ratio = jnp.linalg.norm(of_nll[weight]) / jnp.linalg.norm(of_g[weight])
  np.testing.assert_allclose(d, ratio, rtol=1e-4)


def test_discriminator_minimises_its_own_loss(own):
  """Hinge loss of logits 2x + 0.5: where a margin is open, d/d bias is -1/2 (real), 1/2 (fake)."""
  real = tiny.images(2, 16, 16).mean((1, 2, 3))
  fake = own.reconstruction.mean((1, 2, 3))
  real_open, fake_open = 2 * real + 0.5 < 1, 2 * fake + 0.5 > -1
  gradients = own.discriminator_gradients
  bias = 0.5 * (fake_open.mean() - real_open.mean())
  gain = 0.5 * ((fake_open * fake).mean() - (real_open * real).mean())
  np.testing.assert_allclose(gradients["heads.0.bias"], bias, atol=1e-6)
  np.testing.assert_allclose(gradients["heads.0.gain"], gain, atol=1e-6)


@pytest.mark.slow
def test_official_discriminator_gradient(own, official):
  """The leak: schedule · d · ∂g, with g = -(gain · mean + bias), is added; nothing else changes."""
  leak = {
    k: official.discriminator_gradients[k] - x for k, x in own.discriminator_gradients.items()
  }
  factor = 0.5 * own.metrics["adaptive_weight"]
  mean = own.reconstruction.mean()
  np.testing.assert_allclose(leak["heads.0.bias"], -factor, rtol=1e-5)
  np.testing.assert_allclose(leak["heads.0.gain"], -factor * mean, rtol=1e-4)
  jax.tree.map(np.testing.assert_array_equal, official.gradients, own.gradients)


def test_adaptive_weight():
  a, b = jnp.array([[3.0, 4.0]]), jnp.array([0.5, 0.0])
  assert adaptive_weight(a, b) == pytest.approx(10, rel=1e-5)
  assert adaptive_weight(a, jnp.zeros(2)) == 1e4
  assert adaptive_weight(jnp.zeros(2), jnp.zeros(2)) == 0


def adaptive(tokenizer, layer):
  settings = AdversarialSettings(discriminator="patch", adaptive_layer=layer)
  found = networks(tokenizer, None, Linear(), LOSSES, settings)
  return found.cut, found.adversary.weight


def test_adaptive_layers(tokenizer):
  cut, weight = adaptive(tokenizer, "last")
  assert (cut, weight) == ("up.0.block.0", "vae.decoder.up.0.block.0.conv2.lora_up")
  assert adaptive(tokenizer, "decoder.up.0.block.0.conv2") == (cut, weight)
  upsample = adaptive(tiny.tokenizer(), "decoder.up.1.upsample.conv")
  assert upsample == ("up.1.upsample", "vae.decoder.up.1.upsample.conv.lora_up")
  with pytest.raises(UserError, match="'decoder.up.9'.*decoder.mid.block_1.conv1, .*conv2"):
    adaptive(tokenizer, "decoder.up.9")


@pytest.mark.slow
def test_adaptive_weight_that_does_not_train():
  """Without an adapter the gradients are compared at the kernel, which stays as it is."""
  tokenizer = make_tokenizer(LoRAConfig(rank=4, decoder=False))
  assert adaptive(tokenizer, "last")[1] == "vae.decoder.up.0.block.0.conv2.kernel"
  out = outcome(tokenizer)
  assert not any(".decoder." in name for name in out.gradients)
  assert out.metrics["adaptive_weight"] > 0


@pytest.mark.slow
def test_trained_decoder(tokenizer):
  """Every array that trains has a gradient, whichever side of the cut it is on."""
  everything = outcome(tokenizer, trained=nnx.Param)
  assert set(everything.gradients) == set(arrays.of(tokenizer))
  assert jnp.abs(everything.gradients["vae.decoder.conv_out.kernel"]).max() > 0
  assert jnp.abs(everything.gradients["vae.encoder.conv_in.kernel"]).max() > 0


def test_reconstruction_loss_by_hand():
  image, reconstruction = jnp.zeros((1, 1, 2, 3)), jnp.full((1, 1, 2, 3), -0.5)
  settings = dataclasses.replace(LOSSES, l1=2.0, mse=3.0)
  nll, terms = reconstruction_loss(reconstruction, image, settings, None)
  assert (terms["l1"], terms["mse"], nll) == (0.5, 0.25, 1.75)
