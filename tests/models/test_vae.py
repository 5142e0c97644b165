import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays, weights
from coda_jax.errors import UserError
from coda_jax.models.latent_norm import LatentNorm
from coda_jax.models.vae import AutoencoderKL, GroupNorm, Posterior, VAEConfig
from tests import tiny


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_any_size_the_stride_divides(size):
  vae = tiny.tokenizer().vae
  images = tiny.images(1, *size)
  posterior = tiny.encode(vae, images)
  assert posterior.mean.shape == (1, size[0] // 2, size[1] // 2, 16)
  assert tiny.decode(vae, posterior.mean).shape == images.shape


def test_size_the_stride_does_not_divide():
  with pytest.raises(UserError, match="17x16 is not a multiple of the VAE's stride 2"):
    tiny.tokenizer().vae.encode(tiny.images(1, 17, 16))


def test_patches_of_latents_must_be_whole():
  config = dataclasses.replace(tiny.VAE, norm_patch=2)
  assert config.latent_size(16, 20) == (8, 10)
  with pytest.raises(UserError, match="18x16 is not a multiple of the VAE's stride 4"):
    config.latent_size(18, 16)


def test_latents_are_normalised_by_patches():
  norm = LatentNorm(2, 3)
  rng = np.random.default_rng(0)
  mean, var = rng.normal(size=(2, 2, 3)), rng.uniform(0.5, 2, (2, 2, 3))
  norm.mean[...], norm.var[...] = jnp.asarray(mean), jnp.asarray(var)
  z = rng.normal(size=(2, 4, 6, 3)).astype(np.float32)
  found = norm.normalize(jnp.asarray(z))
  for row, column in ((0, 0), (3, 4), (2, 5)):
    here = (row % 2, column % 2)
    expected = (z[:, row, column] - mean[here]) / np.sqrt(var[here] + 1e-4)
    np.testing.assert_allclose(found[:, row, column], expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(norm.denormalize(found), z, rtol=1e-4, atol=1e-5)


def test_channels_must_fit_the_groups():
  with pytest.raises(UserError, match="vae.ch is 48"):
    VAEConfig(ch=48)


def test_decoder_cut_at_any_layer_is_the_decoder():
  vae = tiny.tokenizer().vae
  z = jnp.ones((1, 8, 8, 16))
  names = [name for name, _ in vae.decoder.named_layers()]
  assert names[0] == "conv_in" and names[-2:] == ["norm_out", "conv_out"]
  assert {"mid.attn_1", "up.1.block.0", "up.1.upsample", "up.0.block.0"} < set(names)

  @nnx.jit
  def in_two(vae, z):
    z = vae.decoder_input(z)
    return [vae.decoder(vae.decoder(z, stop=name), start=name) for name in names]

  whole = tiny.decode(vae, z)
  for image in in_two(vae, z):
    np.testing.assert_allclose(image, whole, rtol=1e-5, atol=1e-5)


def test_bfloat16_compute_keeps_float32_at_the_edges():
  vae, exact = tiny.tokenizer(dtype=jnp.bfloat16).vae, tiny.tokenizer().vae
  images = tiny.images(1, 16, 16)
  posterior = tiny.encode(vae, images)
  assert posterior.mean.dtype == tiny.decode(vae, posterior.mean).dtype == jnp.float32
  reference = tiny.encode(exact, images).mean
  np.testing.assert_allclose(posterior.mean, reference, atol=0.05 * np.abs(reference).max())


def test_posterior_sample():
  p = Posterior(jnp.zeros((1, 2, 2, 1)), jnp.full((1, 2, 2, 1), np.log(4.0)))
  np.testing.assert_allclose(p.sample(noise=jnp.ones((1, 2, 2, 1))), 2.0, rtol=1e-6)


def test_latent_scale_and_back():
  config = dataclasses.replace(tiny.VAE, scale=0.3611, shift=0.1159)
  vae = tiny.tokenizer(dataclasses.replace(tiny.TOKENIZER, vae=config)).vae
  z = jnp.array([0.0, 1.0])
  np.testing.assert_allclose(vae.scale_latents(z), (z - 0.1159) * 0.3611, rtol=1e-6)
  np.testing.assert_allclose(vae.unscale_latents(vae.scale_latents(z)), z, atol=1e-6)


@pytest.fixture(scope="module")
def gradients():
  """Output, gradients and temporaries of a small VAE, without and with rematerialisation."""

  def run(remat):
    make = lambda: AutoencoderKL(tiny.VAE, remat=remat, rngs=nnx.Rngs(0))
    graphdef, params = arrays.split(weights.build(make, tiny.random_params(make), "test"))

    def loss(params, images):
      vae = arrays.merge(graphdef, params)
      out = vae.decode(vae.encode(images).mean)
      return jnp.square(out).mean(), out

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    compiled = compiled.lower(params, tiny.images(2, 12, 20))
    checkpoints = compiled.as_text().count("optimization_barrier")
    (_, out), found = compiled.compile()(params, tiny.images(2, 12, 20))
    return out, found, checkpoints

  return {remat: run(remat) for remat in (False, True)}


@pytest.mark.slow
def test_rematerialisation_changes_no_value(gradients):
  (out, found, barriers), (expected, expected_found, none) = gradients[True], gradients[False]
  assert barriers > none == 0
  np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
  for a, b in zip(*map(jax.tree.leaves, (found, expected_found)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7)


GROUPS = 4


def exact_norm(x, scale, bias):
  """In float64, from the definition."""
  x = np.asarray(x, np.float64)
  b, h, w, c = x.shape
  grouped = x.reshape(b, h, w, GROUPS, c // GROUPS)
  mean = grouped.mean((1, 2, 4), keepdims=True)
  variance = grouped.var((1, 2, 4), keepdims=True)
  return ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias


def norm_and_input(mean=0.0, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  norm = GroupNorm(16, GROUPS)
  norm.scale[...] = jnp.asarray(rng.normal(1, 0.2, 16), jnp.float32)
  norm.bias[...] = jnp.asarray(rng.normal(0, 0.2, 16), jnp.float32)
  return norm, jnp.asarray(mean + rng.normal(0, 1, (2, 9, 7, 16)), dtype)


@pytest.mark.parametrize(("mean", "tolerance"), [(0.0, 5e-6), (1000.0, 1e-3)])
def test_group_norm_is_that_of_float64(mean, tolerance):
  """Far from 0, too; E[x²] − E[x]² would be off by 0.4 at a mean of 1000."""
  norm, x = norm_and_input(mean)
  y = nnx.jit(lambda n, x: n(x))(norm, x)
  expected = exact_norm(x, np.asarray(norm.scale[...]), np.asarray(norm.bias[...]))
  np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


def test_group_norm_of_constant_images():
  norm, _ = norm_and_input()
  y = nnx.jit(lambda n, x: n(x))(norm, jnp.full((1, 64, 64, 16), 1000.1))
  np.testing.assert_allclose(y, np.broadcast_to(norm.bias[...], y.shape), atol=1e-6)


def test_group_norm_gradient_is_the_derivative():
  """In random directions of input, scale and bias, against differences in float64."""
  norm, x = norm_and_input()
  graphdef, params = arrays.split(norm)
  rng = np.random.default_rng(1)
  cotangent = rng.normal(0, 1, x.shape)
  of = lambda p, x: (arrays.merge(graphdef, p)(x) * cotangent.astype(np.float32)).sum()
  gradients = jax.jit(jax.grad(of, (0, 1)))(params, x)
  for _ in range(3):
    inputs = params, x
    direction = jax.tree.map(lambda y: rng.normal(0, 1, y.shape), inputs)
    moved = [
      jax.tree.map(lambda y, d, e=e: np.asarray(y, np.float64) + e * d, inputs, direction)
      for e in (1e-5, -1e-5)
    ]
    values = [(exact_norm(x, p["scale"], p["bias"]) * cotangent).sum() for p, x in moved]
    slope = (values[0] - values[1]) / 2e-5
    ours = sum(
      (g * d).sum() for g, d in zip(*map(jax.tree.leaves, (gradients, direction)), strict=True)
    )
    np.testing.assert_allclose(ours, slope, rtol=2e-4, atol=1e-3)


def test_group_norm_keeps_the_type():
  norm, x = norm_and_input(dtype=jnp.bfloat16)
  assert nnx.jit(lambda n, x: n(x))(norm, x).dtype == jnp.bfloat16
