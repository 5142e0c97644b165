import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays, weights
from coda_jax.errors import UserError
from coda_jax.functional import take_apart
from coda_jax.models import lora as lora_module
from coda_jax.models.lora import Conv, LoRAConfig, merge_lora
from coda_jax.models.vae import FLUX_VAE, MAR_VAE, AutoencoderKL, Posterior, VAEConfig
from coda_jax.ops import group_norm
from tests import tiny

MAR_LORA = LoRAConfig(name_parts=("conv1", "conv2", "upsample", "downsample"))


@pytest.mark.parametrize(
  ("vae", "lora", "adapted"), [(MAR_VAE, MAR_LORA, 66), (FLUX_VAE, LoRAConfig(), 48)]
)
def test_published_shapes(vae, lora, adapted):
  """As many adapted convolutions as the official code has (design facts of the paper's models)."""
  shapes = weights.expected_shapes(lambda: AutoencoderKL(vae, lora=lora, rngs=nnx.Rngs(0)))
  assert sum(k.endswith("lora_up") for k in shapes) == adapted
  assert not any("lora" in k for k in shapes if "nin_shortcut" in k or "conv_in" in k)


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_adapters_on_either_half(encoder, decoder):
  lora = LoRAConfig(encoder=encoder, decoder=decoder)
  shapes = weights.expected_shapes(lambda: AutoencoderKL(tiny.VAE, lora=lora, rngs=nnx.Rngs(0)))
  halves = {k.split(".")[0] for k in shapes if "lora" in k}
  assert halves == {h for h, on in (("encoder", encoder), ("decoder", decoder)) if on}


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


def test_channels_must_fit_the_groups():
  with pytest.raises(UserError, match="vae.ch is 48"):
    VAEConfig(ch=48)


def test_merged_adapters_give_equal_output():
  vae = tiny.tokenizer().vae
  images = tiny.images(1, 16, 16)
  z = tiny.encode(vae, images).mean
  before = z, tiny.decode(vae, z)
  merge_lora(vae)
  assert not any("lora" in k for k in arrays.of(vae))
  after = tiny.encode(vae, images).mean, tiny.decode(vae, z)
  for a, b in zip(before, after, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())


def test_adapters_start_as_the_identity():
  conv = nnx.jit(lambda: Conv(8, 4, rank=2, rngs=nnx.Rngs(0)))()
  assert conv.lora_down.shape == (3, 3, 8, 2) and conv.lora_down[...].any()
  assert conv.lora_up.shape == (1, 1, 2, 4) and not conv.lora_up[...].any()
  np.testing.assert_allclose(conv.lora_down[...].std(), 1 / 2, rtol=0.2)  # 1 / rank
  plain = nnx.clone(conv)
  plain.merge()
  x = jnp.ones((1, 4, 4, 8))
  np.testing.assert_array_equal(nnx.jit(lambda c: c(x))(conv), nnx.jit(lambda c: c(x))(plain))


def test_decoder_cut_at_any_convolution_is_the_decoder():
  vae = tiny.tokenizer().vae
  z = jnp.ones((1, 8, 8, 16))
  cut = vae.decoder.step_index("decoder.up.0.block.0.conv2") + 1

  @nnx.jit
  def in_two(vae, z):
    carry = vae.decoder.run(vae.decoder_input(z), 0, cut)
    return vae.decoder.run(carry, cut)

  np.testing.assert_allclose(in_two(vae, z), tiny.decode(vae, z), rtol=1e-5, atol=1e-5)
  with pytest.raises(UserError, match=r"no adaptive layer 'decoder.up.9'.*up.1.upsample.conv"):
    vae.decoder.step_index("decoder.up.9")


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


# How the VAE computes must not change what: output and gradients of every array and the input.
@functools.cache
def output_and_gradients(fold: bool, remat: str, own_gradients: bool = True):
  if not own_gradients:  # as on other devices: adapters beside convolutions, the norm's by JAX
    with mock.patch.object(lora_module, "platform", lambda: "gpu"):
      with mock.patch.object(group_norm, "platform", lambda: "gpu"):
        return output_and_gradients.__wrapped__(fold, remat)

  def make():
    return AutoencoderKL(tiny.VAE, lora=tiny.LORA, fold=fold, remat=remat, rngs=nnx.Rngs(0))

  structure, arrays = take_apart(weights.build(make, tiny.random_params(make), "test"))
  cut = structure.module(arrays).decoder.step_index("decoder.up.1.block.0.conv1") + 1

  def loss(arrays, images):
    vae = structure.module(arrays)
    carry = vae.decoder.run(vae.decoder_input(vae.encode(images).mean), 0, cut)  # in a block
    out = vae.decoder.run(carry, cut)
    return jnp.square(out).mean(), out

  gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  compiled = jax.jit(gradient).lower(arrays, tiny.images(2, 12, 20)).compile()
  (_, out), gradients = compiled(arrays, tiny.images(2, 12, 20))
  return out, gradients, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
  ("fold", "remat"),
  [(False, "none"), (True, "none"), (False, "convs"), (False, "blocks"), (True, "blocks")],
)
def test_how_gradients_are_taken_changes_nothing(fold, remat):
  expected, expected_gradients, _ = output_and_gradients(False, "none", own_gradients=False)
  out, gradients, _ = output_and_gradients(fold, remat)
  np.testing.assert_allclose(out, expected, atol=1e-5 * np.abs(expected).max())
  for a, b in zip(*map(jax.tree.leaves, (gradients, expected_gradients)), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-7)


def test_recomputing_saves_memory():
  kept = output_and_gradients(False, "none")[-1]
  assert output_and_gradients(False, "convs")[-1] < 0.8 * kept
  assert output_and_gradients(False, "none", own_gradients=False)[-1] > kept
