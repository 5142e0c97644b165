"""Images from classes and edits of images, with small random models."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

import coda_jax
from coda_jax import weights
from coda_jax.errors import UserError
from coda_jax.generation.generator import Generator
from coda_jax.generation.sampler import SamplerSettings
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from tests import tiny

CONFIG = MaskGITConfig(
  width=32,
  depth=0,
  heads=2,
  num_classes=3,
  patch_sizes=tiny.QUANTIZER.patch_sizes,
  codebook_size=tiny.QUANTIZER.codebook_size,
)
NAMES = ("cat", "dog", "7up")


@functools.cache
def model(config=CONFIG):
  codes = jax.random.normal(jax.random.key(5), (config.codebook_size, config.code_dim))
  return nnx.jit(lambda: MaskGIT(config, codes=codes, rngs=nnx.Rngs(0)))()


@functools.cache
def generator():
  return Generator(model(), tiny.tokenizer(), NAMES)


def save(path, order="uniform"):
  weights.save_tokenizer(tiny.tokenizer(), path / "tokenizer")
  weights.save_generator(model(), path / "tokenizer", path / "generator", NAMES, order)
  return path / "generator"


@pytest.mark.slow
def test_saved_and_loaded(tmp_path):
  loaded = coda_jax.load_generator(save(tmp_path))
  classes = ["dog", 2]
  images = loaded.generate(classes, steps=4, key=jax.random.key(3))
  assert images.shape == (2, 16, 16, 3)
  assert str(loaded) == ("Generator(3 classes, 16 x 16 images, 78 tokens of 64 codes, width 32)")
  three = loaded.generate([*classes, None], steps=4, key=jax.random.key(3))
  assert three.shape == (3, 16, 16, 3), "sampled as four"
  np.testing.assert_allclose(three[:2], images, atol=1e-4)
  bytes_ = np.asarray((np.asarray(images).clip(-1, 1) + 1) * 127.5, np.uint8)
  np.testing.assert_array_equal(loaded.encode(bytes_), loaded.encode(coda_jax.as_images(bytes_)))
  ours = generator().generate([1, "7up"], steps=4, key=jax.random.key(3))
  np.testing.assert_array_equal(images, ours)
  again = generator().generate(["7up"], steps=4, key=jax.random.key(3), first=1)
  np.testing.assert_allclose(again[0], images[1], atol=1e-4)


@pytest.mark.slow
def test_samples_in_the_order_of_training(tmp_path):
  loaded = coda_jax.load_generator(save(tmp_path, "coarse_to_fine"))
  images = loaded.generate(["dog"], steps=4)
  same = generator().generate(["dog"], steps=4, order="coarse_to_fine")
  np.testing.assert_array_equal(images, same)
  uniform = loaded.generate(["dog"], steps=4, order="uniform")
  np.testing.assert_array_equal(uniform, generator().generate(["dog"], steps=4))
  assert np.abs(uniform - images).max() > 0


@pytest.mark.slow
def test_decode_and_encode_are_the_tokenizers():
  g, tok = generator(), tiny.tokenizer()
  images = tiny.images(2, 16, 16)
  ids = tiny.tokens(tok, images)
  flat = np.concatenate([i.reshape(2, -1) for i in ids], 1)
  np.testing.assert_array_equal(g.encode(images), flat)
  np.testing.assert_allclose(g.decode(flat), tiny.pixels(tok, ids, None), atol=1e-4)
  # Masked levels add nothing: the image of the levels before them.
  part = np.where(CONFIG.levels < 2, flat, CONFIG.mask_id)
  expected = tiny.pixels(tok, ids[:2], (16, 16))
  np.testing.assert_allclose(g.decode(part), expected, atol=1e-4)


def test_inpainting_keeps_what_is_outside():
  g, images = generator(), np.asarray(tiny.images(2, 16, 16))
  mask = np.zeros((16, 16), bool)
  mask[:, 8:] = True
  out = g.inpaint(images, mask, ["cat", None], steps=4, key=jax.random.key(0))
  np.testing.assert_array_equal(out[:, :, :8], images[:, :, :8])
  assert np.abs(out[:, :, 8:] - images[:, :, 8:]).mean() > 0.01
  made = g.inpaint(images, mask, ["cat", None], steps=4, key=jax.random.key(0), paste=False)
  np.testing.assert_array_equal(made[:, :, 8:], out[:, :, 8:])
  assert np.abs(made - images)[:, :, :8].max() > 0


def test_class_change_keeps_the_first_levels(monkeypatch):
  g, images, seen = generator(), tiny.images(2, 16, 16), []
  real = g.sample
  monkeypatch.setattr(g, "sample", lambda ids, *a, **k: seen.append(ids) or real(ids, *a, **k))
  out = g.change_class(images, ["dog", "dog"], steps=4, keep_levels=2)
  assert out.shape == images.shape
  encoded = np.asarray(g.encode(images))
  np.testing.assert_array_equal(seen[0][:, :5], encoded[:, :5])
  assert (seen[0][:, 5:] == CONFIG.mask_id).all()
  with pytest.raises(UserError, match="keep_levels is 4.*4 levels"):
    g.change_class(images, ["dog", "dog"], keep_levels=4)


def test_filmstrip_ends_with_the_image():
  g = generator()
  out = g.sample(g.masked(2), [0, 1], SamplerSettings(steps=4), jax.random.key(0), keep_steps=True)
  assert out.history.shape == (4, 2, CONFIG.tokens)
  np.testing.assert_array_equal(out.history[-1], out.ids)


@pytest.mark.parametrize(
  ("classes", "message"),
  [
    ([3], "class 3 is out of range.*0 to 2"),
    ([-1], "out of range"),
    (["bird"], "'bird'.*cat, dog"),
  ],
)
def test_bad_classes(classes, message):
  with pytest.raises(UserError, match=message):
    generator().generate(classes)


def test_other_errors():
  with pytest.raises(UserError, match="steps is 79.*78 tokens"):
    generator().generate([0], steps=79)
  with pytest.raises(UserError, match="32 x 16 pixels.*16 x 16"):
    generator().change_class(tiny.images(1, 16, 32), [0])


def test_models_that_do_not_fit():
  config = MaskGITConfig(
    width=8, depth=0, heads=1, num_classes=3, patch_sizes=(1, 2, 3, 8), codebook_size=65
  )
  with pytest.raises(UserError, match="the generator has codebook_size 65.*64"):
    Generator(model(config), tiny.tokenizer())
