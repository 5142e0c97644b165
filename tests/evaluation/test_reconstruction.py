import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import arrays
from coda_jax.data.pipeline import normalize
from coda_jax.evaluation import reconstruction as rec
from coda_jax.models.lpips import LPIPS
from tests import tiny

_measured = arrays.jit_module(
  lambda tokenizer, x: (
    rec.encode_levels(tokenizer, x),
    rec.reconstruct_batch(tokenizer, x),
    tokenizer.quantizer(tokenizer.latents(x)),
    tokenizer.reconstruct(x),
  )
)


@pytest.fixture(scope="module")
def tokenizer():
  return tiny.tokenizer()


def photos(count: int, *size: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


@pytest.mark.slow
def test_levels_agree_with_the_tokenizer(tokenizer):
  images = normalize(photos(2, 16, 16))
  encoded, result, out, images_out = _measured(tokenizer)(images)
  for ours, theirs in zip(encoded.ids, out.ids, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  assert encoded.codebook_size == result.codebook_size == 64
  np.testing.assert_allclose(encoded.quantized[:, -1], out.latents, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(encoded.level_errors.mean(0), out.level_mse, rtol=1e-4)
  np.testing.assert_allclose(result.images, images_out, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(result.level_errors, encoded.level_errors, rtol=1e-4)
  np.testing.assert_allclose(result.latent_mean, encoded.latents.mean((1, 2)), rtol=1e-4, atol=1e-5)
  assert result.lpips is None
  inputs = encoded.level_inputs()
  assert [x.shape for x in inputs] == [(2 * p * p, 16) for p in (1, 2, 3, 8)]
  np.testing.assert_allclose(inputs[0], encoded.latents.mean((1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    inputs[-1].reshape(2, 8, 8, 16), encoded.latents - encoded.quantized[:, -2], atol=1e-4
  )


def test_lpips_from_the_features_of_the_originals():
  calls = []

  class MeanSquare(LPIPS):
    def __init__(self):
      pass

    def features(self, images):
      calls.append(images.shape)
      return (images,)

    def distance(self, a, b):
      return jnp.square(a[0] - b[0]).mean((1, 2, 3))

  real = jnp.zeros((2, 16, 16, 3))
  distance = rec.lpips_from(MeanSquare(), real)
  np.testing.assert_allclose(distance(real + 0.5), [0.25, 0.25])
  np.testing.assert_allclose(distance(real - 3), [1, 1])  # clipped
  assert len(calls) == 1  # one program for originals and reconstructions
  assert rec.lpips_from(None, real)(real) is None


def test_frozen_vae_leaves_the_adapters_out(tokenizer):
  vae = rec.frozen_vae(tokenizer)
  own, adapted = arrays.of(vae), arrays.of(tokenizer.vae)
  assert set(own) == {k for k in adapted if "lora" not in k}
  assert all(np.array_equal(own[k], adapted[k]) for k in own)
