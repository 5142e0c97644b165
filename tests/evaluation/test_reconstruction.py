import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import arrays
from coda_jax.data.pipeline import normalize
from coda_jax.evaluation import reconstruction as rec
from coda_jax.evaluation.image_quality import psnr, ssim, to_uint8
from tests import tiny

_encode = rec.jit_module(
  lambda tokenizer, x: (rec.encode_levels(tokenizer, x), tokenizer.quantizer(tokenizer.latents(x)))
)
_reconstruct_batch = rec.jit_module(rec.reconstruct_batch)


@pytest.fixture(scope="module")
def tokenizer():
  return tiny.tokenizer()


def photos(count: int, *size: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def test_encode_levels_agrees_with_the_tokenizer(tokenizer):
  images = normalize(photos(2, 16, 16))
  encoded, out = _encode(tokenizer)(images)
  for ours, theirs in zip(encoded.ids, out.ids, strict=True):
    np.testing.assert_array_equal(ours, theirs)
  np.testing.assert_allclose(encoded.quantized[-1], out.latents, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(encoded.level_errors.mean(0), out.level_mse, rtol=1e-4)
  inputs = encoded.level_inputs()
  assert [x.shape for x in inputs] == [(2 * p * p, 16) for p in (1, 2, 3, 8)]
  np.testing.assert_allclose(inputs[0], encoded.latents.mean((1, 2)), rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    inputs[-1].reshape(2, 8, 8, 16), encoded.latents - encoded.quantized[-2], atol=1e-4
  )


def test_metrics_of_padded_batches(tokenizer):
  images = photos(3, 16, 16)
  batches = rec.in_batches(images, 2)
  assert [valid.tolist() for _, valid in batches] == [[True, True], [True, False]]
  results = [_reconstruct_batch(tokenizer)(normalize(x)) for x, _ in batches]
  parts = [
    rec.ReconstructionMetrics.of(result, x, 64, valid)
    for result, (x, valid) in zip(results, batches, strict=True)
  ]
  metrics = parts[0].merge(parts[1])
  assert metrics.count == 3
  assert metrics.usage.counts.sum(axis=1).tolist() == [3, 12, 27, 192]

  made = np.concatenate([results[0].images, results[1].images[:1]])
  np.testing.assert_array_equal(metrics.quality.psnr, psnr(images, to_uint8(made)))
  np.testing.assert_array_equal(metrics.quality.ssim, ssim(images, to_uint8(made)))
  encoded = [_encode(tokenizer)(normalize(x))[0] for x, _ in batches]
  latents = np.concatenate([encoded[0].latents, encoded[1].latents[:1]])
  np.testing.assert_allclose(metrics.latent_variance, latents.var((0, 1, 2)).mean(), rtol=1e-4)
  summary = metrics.summary()
  assert summary["quantization_error"] == summary["quantization_error/level_4"]
  assert summary["quantization_error"] == pytest.approx(metrics.level_errors[:, -1].mean())
  assert "lpips" not in summary


def test_frozen_vae_leaves_the_adapters_out(tokenizer):
  vae = rec.frozen_vae(tokenizer)
  own, adapted = arrays.of(vae), arrays.of(tokenizer.vae)
  assert set(own) == {k for k in adapted if "lora" not in k}
  assert all(np.array_equal(own[k], adapted[k]) for k in own)
  assert vae.encoder.down[0].block[0].conv1.rank == 0


def test_jit_module_compiles_once_per_structure_and_shape(tokenizer):
  calls = []

  def traced(module, x):
    calls.append(x.shape)
    return module.quantizer.values() * x.mean()

  fn = rec.jit_module(traced)
  for seed in (0, 1):  # other weights, same structure
    for shape in ((2, 3), (4, 3)):
      fn(tiny.tokenizer(seed=seed))(jnp.ones(shape))
  assert calls == [(2, 3), (4, 3)]
  assert fn(tokenizer)(jnp.ones((2, 3))).shape == (64, 16)
