"""The Python interface: images in every form, padding, rows of ids, words about a model."""

import io
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import coda_jax
from coda_jax import api, weights
from coda_jax.errors import UserError
from tests import tiny


@pytest.fixture(scope="module")
def tok(tmp_path_factory):
  path = tmp_path_factory.mktemp("api") / "tokenizer"
  weights.save_tokenizer(tiny.tokenizer(), path)
  return coda_jax.load_tokenizer(path)


@pytest.fixture(scope="module")
def pixels():
  return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def ids(tok, pixels):
  return tok.encode(pixels)


def test_the_import_touches_no_device_and_builds_nothing():
  code = "import sys, coda_jax; print('jax' in sys.modules, coda_jax.__version__, dir(coda_jax))"
  out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
  assert out.startswith(f"False {coda_jax.__version__}") and "load_tokenizer" in out
  with pytest.raises(AttributeError, match="no attribute 'nothing'"):
    _ = coda_jax.nothing


def test_every_form_of_images_is_the_same_batch(pixels, tmp_path):
  file = tmp_path / "a.png"
  Image.fromarray(pixels[0]).save(file)
  expected = pixels.astype(np.float32) / 127.5 - 1
  forms = [
    pixels,
    expected,
    jnp.asarray(expected),
    list(pixels),
    [Image.fromarray(x) for x in pixels],
    [file, Image.fromarray(pixels[1]), jnp.asarray(expected[2])],
    [str(file), pixels[1:]],
  ]
  for images in forms:
    np.testing.assert_array_equal(coda_jax.as_images(images), expected)
  for image in (pixels[0], Image.fromarray(pixels[0]), file):
    np.testing.assert_array_equal(coda_jax.as_images(image), expected[:1])
  grey = coda_jax.as_images(Image.fromarray(pixels[0, ..., 0]))
  assert grey.shape == (1, 16, 16, 3)


def test_pictures_come_back(pixels):
  back = coda_jax.to_pil(coda_jax.as_images(pixels))
  np.testing.assert_array_equal(np.stack([np.asarray(x) for x in back]), pixels)


def test_what_is_no_image_is_one_line(tmp_path, pixels):
  (tmp_path / "b.png").write_bytes(b"no image")
  for images, message in (
    (tmp_path / "b.png", "b.png is no readable image: not an image of a known format"),
    (tmp_path / "c.png", "c.png: No such file"),
    (tmp_path, "is a folder; list its files"),
    ([pixels[0], pixels[0, :8]], "images of one size are needed, not 16 x 16, 16 x 8"),
    ([], "not none at all"),
    (pixels.transpose(0, 3, 1, 2), "NCHW becomes NHWC"),
    (3, "a int was given"),
    (Image.fromarray(np.zeros((4, 4), np.float32)), "an image of mode F"),
  ):
    with pytest.raises(UserError, match=re.escape(message)):
      coda_jax.as_images(images)


def test_calls_are_those_of_the_plain_module(tok, pixels, ids):
  plain, images = tiny.tokenizer(), coda_jax.as_images(pixels)
  for ours, expected in zip(ids, tiny.encode(plain, images), strict=True):
    assert ours.shape == expected.shape
    np.testing.assert_array_equal(ours, expected)
  for ours, expected in zip(ids, nnx.jit(lambda t, x: t.encode(x))(tok, images), strict=True):
    np.testing.assert_array_equal(ours, expected)
  for ours, expected in zip(ids, tok.quantize(tok.latents(pixels)), strict=True):
    np.testing.assert_array_equal(ours, expected)


def test_batches_are_padded_to_few_sizes(tok, pixels, ids):
  assert [api.arrays.padded_size(b) for b in (1, 2, 3, 5, 8, 9, 16, 33)] == [
    1,
    2,
    4,
    8,
    8,
    16,
    16,
    40,
  ]
  before = set(api._compiled)
  four = tok.encode(np.concatenate([pixels, pixels[:1]]))
  assert api._compiled == before, "three images were padded to four"
  for a, b in zip(four, ids, strict=True):
    np.testing.assert_array_equal(a[:3], b)


def test_rows_and_grids(tok, ids):
  rows = tok.flatten(ids)
  assert rows.shape == (3, 78) == (3, tok.tokens_per_image)
  for a, b in zip(tok.unflatten(rows), ids, strict=True):
    np.testing.assert_array_equal(a, b)
  assert [x.shape for x in tok.unflatten(rows[:, :5])] == [(3, 1, 1), (3, 2, 2)]
  assert [x.shape[1:] for x in tok.unflatten(np.zeros((1, 156), int), (16, 32))][-1] == (8, 16)
  np.testing.assert_array_equal(tok.decode(rows), tok.decode(ids))
  with pytest.raises(UserError, match=r"shape \[3, 4\]; rows \[B, N\] are needed with N = 78, or"):
    tok.decode(rows[:, :4])


def test_reconstructions_and_samples_of_the_posterior(tok, pixels, ids):
  out = tok.reconstruct(pixels, levels=2)
  np.testing.assert_array_equal(out, tok.decode(ids[:2], 16))
  assert out.shape == (3, 16, 16, 3)
  drawn = [np.asarray(tok.latents(pixels, jax.random.key(i))) for i in (0, 0, 1)]
  np.testing.assert_array_equal(drawn[0], drawn[1])
  assert drawn[0].shape == (3, 8, 8, 16) and (drawn[0] != drawn[2]).any()


def test_a_tokenizer_without_adapters_gives_the_same(tok, pixels, ids, tmp_path):
  merged = tok.merge_lora()
  assert tok.config.lora is not None and merged.config.lora is None
  assert not any("lora" in k for k in api.arrays.of(merged))
  np.testing.assert_array_equal(merged.encode(pixels)[0], ids[0])
  coda_jax.save_tokenizer(merged, tmp_path / "merged")
  assert repr(coda_jax.load_tokenizer(tmp_path / "merged")) == str(merged)


def test_what_a_model_says_of_itself(tok):
  assert tok.token_shape == ((1, 1), (2, 2), (3, 3), (8, 8))
  assert (tok.codebook_size, tok.bits_per_image) == (64, 78 * 6)
  assert str(tok) == (
    "Tokenizer(16 x 16 images, 78 tokens in 4 levels, 64 codes (attention), 468 bits; "
    "2x VAE, LoRA of rank 4)"
  )


def test_a_vae_takes_the_same_images(tmp_path, pixels):
  weights.save_vae(tiny.tokenizer().vae, tmp_path / "vae")
  vae = coda_jax.load_vae(tmp_path / "vae")
  posterior = vae.encode([Image.fromarray(x) for x in pixels])
  assert posterior.mean.shape == (3, 8, 8, 16)
  np.testing.assert_array_equal(vae.reconstruct(pixels), vae.decode(posterior.mean))
  assert str(vae) == "AutoencoderKL(2x downsampling, 16 channels, ch 32 x (1, 1), float32)"


def test_a_person_is_told_of_a_compilation_once(tok, pixels, monkeypatch):
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  tok.encode(pixels)
  monkeypatch.setattr(sys, "stderr", terminal := Terminal())
  tok.encode(pixels)
  assert terminal.getvalue() == ""
  tok.decode(tok.unflatten(np.zeros((1, 1), int)))
  tok.decode(tok.unflatten(np.ones((1, 1), int)))
  assert re.fullmatch(r"compiling decode for 1 x 1 x 1, once; .* \d+ s\n", terminal.getvalue())
