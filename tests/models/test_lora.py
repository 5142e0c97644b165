import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays, weights
from coda_jax.errors import UserError
from coda_jax.models.lora import LoRAConfig, LoRAConv, add_lora, merge_lora
from coda_jax.models.vae import FLUX_VAE, MAR_VAE, AutoencoderKL
from tests import tiny

MAR_LORA = LoRAConfig(name_parts=("conv1", "conv2", "upsample", "downsample"))


def shapes_of(vae, lora):
  def make():
    rngs = nnx.Rngs(0)
    return add_lora(AutoencoderKL(vae, rngs=rngs), lora, rngs=rngs)

  return weights.expected_shapes(make)


@pytest.mark.parametrize(
  ("vae", "lora", "adapted"), [(MAR_VAE, MAR_LORA, 66), (FLUX_VAE, LoRAConfig(), 48)]
)
def test_published_shapes(vae, lora, adapted):
  """As many adapted convolutions as the official code has."""
  shapes = shapes_of(vae, lora)
  assert sum(k.endswith("lora_up") for k in shapes) == adapted
  assert not any("lora" in k for k in shapes if "nin_shortcut" in k or "conv_in" in k)
  assert shapes["encoder.down.0.block.0.conv1.lora_down"] == (3, 3, 128, 32)
  assert shapes["encoder.down.0.block.0.conv1.lora_up"] == (1, 1, 32, 128)


@pytest.mark.parametrize("encoder", [True, False])
@pytest.mark.parametrize("decoder", [True, False])
def test_adapters_on_either_half(encoder, decoder):
  shapes = shapes_of(tiny.VAE, LoRAConfig(encoder=encoder, decoder=decoder))
  halves = {k.split(".")[0] for k in shapes if "lora" in k}
  assert halves == {h for h, on in (("encoder", encoder), ("decoder", decoder)) if on}


def test_rank_must_be_positive():
  with pytest.raises(UserError, match="lora.rank is 0"):
    LoRAConfig(rank=0)


def test_merged_adapters_give_equal_output():
  vae = tiny.tokenizer().vae
  images = tiny.images(1, 16, 16)
  z = tiny.encode(vae, images).mean
  before = z, tiny.decode(vae, z)
  merge_lora(vae)
  assert not any("lora" in k for k in arrays.of(vae))
  assert type(vae.decoder.up[0].block[0].conv1) is nnx.Conv
  after = tiny.encode(vae, images).mean, tiny.decode(vae, z)
  for a, b in zip(before, after, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max())


def conv(stride=1, **kwargs) -> LoRAConv:
  options = {"strides": (stride, stride), "padding": ((0, 1), (1, 1)), "dtype": jnp.float32}
  rngs = nnx.Rngs(0)
  return LoRAConv(nnx.Conv(8, 4, (3, 3), **options | kwargs, rngs=rngs), 2, rngs=rngs)


def test_adapters_start_as_the_identity():
  adapted = conv()
  assert adapted.lora_down.shape == (3, 3, 8, 2) and adapted.lora_down[...].any()
  assert adapted.lora_up.shape == (1, 1, 2, 4) and not adapted.lora_up[...].any()
  np.testing.assert_allclose(adapted.lora_down[...].std(), 1 / 2, rtol=0.2)  # 1 / rank
  x = jnp.ones((1, 4, 4, 8))
  run = nnx.jit(lambda c: c(x))
  np.testing.assert_array_equal(run(adapted), run(adapted.merged()))


def beside(conv, x, kernel, down, up):
  """The paper's form: two convolutions beside the frozen one."""
  strides, padding = conv
  convolve = lambda x, k, s, p: jax.lax.conv_general_dilated(
    x, k, s, p, dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  adapter = convolve(convolve(x, down, strides, padding), up, (1, 1), ((0, 0), (0, 0)))
  return convolve(x, kernel, strides, padding) + adapter


@pytest.mark.parametrize("stride", [1, 2])
def test_output_and_gradients_are_those_of_an_adapter_beside_the_convolution(stride):
  rng = np.random.default_rng(0)
  graphdef, params = arrays.split(conv(stride))
  params = {k: jnp.asarray(rng.normal(size=x.shape), jnp.float32) for k, x in params.items()}
  x = jnp.asarray(rng.normal(size=(2, 6, 8, 8)), jnp.float32)
  window = ((stride, stride), ((0, 1), (1, 1)))

  def ours(params, x):
    return arrays.merge(graphdef, params)(x)

  def theirs(params, x):
    y = beside(window, x, *(params[k] for k in ("kernel", "lora_down", "lora_up")))
    return y + params["bias"]

  expected, pull = jax.vjp(theirs, params, x)
  found, pull_ours = jax.vjp(ours, params, x)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
  dy = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
  for a, b in zip(*map(jax.tree.leaves, (pull_ours(dy), pull(dy))), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def test_bfloat16_has_float32_gradients_of_parameters():
  graphdef, params = arrays.split(conv(dtype=jnp.bfloat16))
  params["lora_up"] = jnp.ones_like(params["lora_up"])
  x = jnp.ones((1, 4, 4, 8), jnp.bfloat16)
  y, pull = jax.vjp(lambda p, x: arrays.merge(graphdef, p)(x), params, x)
  gradients, dx = pull(jnp.ones_like(y))
  assert y.dtype == dx.dtype == jnp.bfloat16
  assert {g.dtype for g in gradients.values()} == {jnp.dtype("float32")}
