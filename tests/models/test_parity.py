"""The models against the official code's outputs; weights go through the real converter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
from coda_jax import weights
from coda_jax.models.lora import add_lora
from coda_jax.models.quantizer import ResidualQuantizer
from coda_jax.models.vae import AutoencoderKL
from coda_jax.ops import resize
from convert import coda, rules
from tests.conftest import assert_close

pytestmark = pytest.mark.usefixtures("optimized")

NORMS = {"rms_norm": "rms", "layer_norm": "layer", None: "none"}


def nhwc(x):
  return jnp.asarray(np.moveaxis(x, 1, -1))


def nchw(x):
  return np.moveaxis(x, -1, 1)


@pytest.mark.parity("resize")
def test_resizes_are_torchs(golden):
  x, out, n = nhwc(golden.input()), golden.outputs(), golden["size"]
  for p in golden["patch_sizes"]:
    pooled = resize.area_resize(x, (p, p))
    assert_close(nchw(pooled), out[f"area_{p}"], 1e-5, f"area {p}")
    if f"bicubic_{p}" in out:
      back = resize.bicubic_resize(pooled, (n, n))
      assert_close(nchw(back), out[f"bicubic_{p}"], 1e-5, f"bicubic {p}")


@pytest.mark.parity("vae")
def test_autoencoder(golden):
  state = golden.state_dict(golden["keys"])
  if golden["layout"].startswith("coda"):
    config, lora, flat = convert.vae_to_flat(golden["layout"], state)
    assert lora is not None
  else:
    options = golden.case.get("options", {})
    (config, flat), lora = convert.to_flat(golden["layout"], state, **options), None

  def make():
    rngs = nnx.Rngs(0)
    return add_lora(AutoencoderKL(config, rngs=rngs), lora, rngs=rngs)

  vae = weights.build(make, flat, golden.name)

  @jax.jit
  def run(state, images):
    vae_ = nnx.merge(graphdef, state)
    posterior = vae_.encode(images)
    scaled = vae_.scale_latents(posterior.mean)
    decoded = vae_.decode(vae_.unscale_latents(scaled))
    return posterior.mean, posterior.logvar, scaled, decoded

  graphdef, state = nnx.split(vae)
  mean, logvar, scaled, decoded = run(state, nhwc(golden.input()))
  out = golden.outputs()
  moments = np.concatenate([nchw(mean), nchw(logvar)], 1)
  golden_mean, golden_logvar = np.split(out["moments"], 2, axis=1)
  expected = np.concatenate([golden_mean, golden_logvar.clip(-30, 20)], 1)
  assert_close(moments, expected, 1e-4, "moments")
  assert_close(nchw(decoded), out["decoded"], 1e-4, "decoded")
  if "scaled" in out:
    assert_close(nchw(scaled), out["scaled"], 1e-4, "scaled")


@pytest.mark.parity("quantizer")
def test_quantizer_and_its_gradients(golden):
  config, flat = convert.quantizer_to_flat(golden.state_dict(golden["keys"]), golden["patch_sizes"])
  assert config.codebook_size == golden["codebook_size"]
  assert (config.norm, config.attn_dim) == (NORMS[golden["norm"]], golden["attn_dim"])
  config = dataclasses.replace(config, beta=golden["beta"])
  quantizer = weights.build(lambda: ResidualQuantizer(config, rngs=nnx.Rngs(0)), flat, golden.name)
  graphdef, state = nnx.split(quantizer)

  @jax.jit
  def run(state, x):
    def loss(state, x):
      out = nnx.merge(graphdef, state)(x)
      return jnp.square(out.latents).mean() + out.vq_loss + 0.05 * out.entropy_loss, out

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(state, x)

  (loss, found), (grads, grad_x) = run(state, nhwc(golden.input()))
  out = golden.outputs()
  for level, ids in enumerate(found.ids):
    np.testing.assert_array_equal(ids, out[f"ids_{level}"])
  assert_close(nchw(found.latents), out["f_hat"], 1e-5, "f_hat")
  for name, value in (
    ("vq_loss", found.vq_loss),
    ("entropy_loss", found.entropy_loss),
    ("loss", loss),
  ):
    assert_close(value, out[name], 1e-5, name)
  assert_close(nchw(grad_x), out["grad_x"], 1e-4, "grad_x")

  theirs = rules.names_in(coda.QUANTIZER, list(flat))
  ours = {".".join(map(str, path)): v[...] for path, v in nnx.to_flat_state(grads)}
  assert {f"grad.{key}" for key, _ in theirs.values()} == {k for k in out if k.startswith("grad.")}
  for name, (key, transform) in theirs.items():
    gradient = transform.to_theirs(np.asarray(ours[name]))
    if key == "attn.norm_k.bias" or (key == "attn.to_k.bias" and config.norm == "none"):
      # Zero in mathematics: adding a constant to every logit changes no softmax.
      assert np.abs(gradient).max() < 1e-6 and np.abs(out[f"grad.{key}"]).max() < 1e-6
    else:
      assert_close(gradient, out[f"grad.{key}"], 1e-4, key)
