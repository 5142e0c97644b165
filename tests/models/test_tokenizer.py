import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from coda_jax.errors import UserError
from tests import tiny


def test_reconstructs_from_ids_alone():
  tok, images = tiny.tokenizer(), tiny.images(1, 16, 16)
  ids = tiny.tokens(tok, images)
  assert [i.shape for i in ids] == [(1, p, p) for p in tiny.QUANTIZER.patch_sizes]
  assert all(i.dtype == np.int32 for i in ids)
  reconstruct = nnx.jit(lambda tok, x, levels: tok.reconstruct(x, levels), static_argnums=2)
  for levels in (None, 2):
    ours, direct = tiny.pixels(tok, ids[:levels], None), reconstruct(tok, images, levels)
    np.testing.assert_allclose(ours, direct, atol=1e-5)


def test_other_sizes_and_shapes():
  tok, images = tiny.tokenizer(), tiny.images(1, 12, 20)
  ids = tiny.tokens(tok, images)
  assert ids[-1].shape == (1, 6, 10)
  assert tiny.pixels(tok, ids, None).shape == images.shape
  assert tiny.pixels(tok, ids[:1], (12, 20)).shape == images.shape


def test_sampled_posterior_is_a_choice():
  tok, images = tiny.tokenizer(), tiny.images(1, 16, 16)
  latents = nnx.jit(lambda tok, x, key: tok.latents(x, key))
  a, b, c = (latents(tok, images, key) for key in (None, jax.random.key(0), jax.random.key(0)))
  assert not np.array_equal(a, b)
  np.testing.assert_array_equal(b, c)


def test_patch_sizes_must_end_at_the_latent():
  with pytest.raises(UserError, match="ends with 8; images of 32 have latents of 16x16"):
    dataclasses.replace(tiny.TOKENIZER, image_size=32)


def test_code_width_must_be_the_latents():
  quantizer = dataclasses.replace(tiny.QUANTIZER, code_dim=8)
  with pytest.raises(UserError, match="code_dim is 8, but the VAE's latents have 16"):
    dataclasses.replace(tiny.TOKENIZER, quantizer=quantizer)


def test_training_and_inference_see_the_same_ids():
  tok, images = tiny.tokenizer(), tiny.images(1, 16, 16)
  trained = nnx.jit(lambda tok, x: tok.quantizer(tok.latents(x)))(tok, images)
  for a, b in zip(trained.ids, tiny.tokens(tok, images), strict=True):
    np.testing.assert_array_equal(a, b)
