"""Images from texts: prompts, negative prompts, and the text encoder of a saved generator."""

import functools
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import coda_jax
from coda_jax import text, weights
from coda_jax.errors import UserError
from coda_jax.generation.generator import Generator, load_generator
from coda_jax.models.conditions import TextShape
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from tests import tiny
from tests.generation import test_generator

CONFIG = MaskGITConfig(
  width=32,
  depth=0,
  heads=2,
  num_classes=0,
  patch_sizes=tiny.QUANTIZER.patch_sizes,
  codebook_size=tiny.QUANTIZER.codebook_size,
  text=TextShape(tiny.TEXT.context, tiny.TEXT.width),
)
HOW = {"steps": 2, "key": jax.random.key(3)}  # two images each: few programs


def save(path, *, inside=True):
  """A generator of texts with random weights; its text encoder is in it, or beside it."""
  encoder = tiny.save_text_encoder(path / "encoder")
  loaded = text.load_text_encoder(encoder)
  model = nnx.clone(_model())
  model.condition.empty[...] = jnp.asarray(loaded.encode([""])[0])
  weights.save_tokenizer(tiny.tokenizer(), path / "tokenizer")
  weights.save_generator(
    model,
    path / "tokenizer",
    path / "generator",
    text_encoder=loaded.fingerprint,
    text_encoder_dir=encoder if inside else None,
  )
  return path / "generator"


@functools.cache
def _model():
  codes = jax.random.normal(jax.random.key(5), (CONFIG.codebook_size, CONFIG.code_dim))
  model = nnx.jit(lambda: MaskGIT(CONFIG, codes=codes, rngs=nnx.Rngs(0)))()
  model.condition.linear.kernel[...] *= 20  # so that a fresh model listens
  return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp("texts")
  save(path)
  return path


@pytest.fixture(scope="module")
def generator(folder):
  return load_generator(folder / "generator")


@pytest.mark.slow
def test_prompts_decide_the_images(generator):
  images = generator.generate(prompts=["a red bird", "two cars"], **HOW)
  assert images.shape == (2, 16, 16, 3)
  other = generator.generate(prompts=["a blue bird", "two cars"], **HOW)
  np.testing.assert_allclose(other[1], images[1], atol=1e-4)
  assert np.abs(other[0] - images[0]).max() > 0.01


def test_the_public_generator_pads_prompts(folder, generator, monkeypatch):
  public = coda_jax.load_generator(folder / "generator")
  assert str(public).startswith("Generator(texts, 16 x 16 images")
  seen = []
  monkeypatch.setattr(
    Generator, "generate", lambda self, **given: seen.append(given) or jnp.zeros(4)
  )
  made = public.generate(prompts=["a", "b", "c"], negative_prompts=["d", "e", "f"], first=2)
  assert made.shape == (3,)
  assert seen[0]["prompts"] == ["a", "b", "c", None]
  assert seen[0]["negative_prompts"] == ["d", "e", "f", None] and seen[0]["first"] == 2


@pytest.mark.slow
def test_guidance_leads_away_from_the_negative_prompt(generator):
  wanted = ["a red bird", "two cars"]
  draw = functools.partial(generator.generate, prompts=wanted, guidance_ramp="constant", **HOW)
  guided, empty = draw(), draw(negative_prompts="")
  np.testing.assert_allclose(empty, guided, atol=1e-4)
  away = draw(negative_prompts=["blurred", "dark"])
  assert np.abs(away - guided).max() > 0.01
  # cond + s (cond - cond)
  np.testing.assert_allclose(draw(negative_prompts=wanted), draw(guidance=0), atol=1e-4)
  with pytest.raises(UserError, match="do nothing without guidance"):
    draw(guidance=0, negative_prompts="blurred")
  with pytest.raises(UserError, match="1 negative prompts for 2 images"):
    draw(negative_prompts=["blurred"])


@pytest.mark.slow
def test_inpainting_with_a_prompt(generator):
  images, mask = np.asarray(tiny.images(2, 16, 16)), np.zeros((16, 16), bool)
  mask[:, 8:] = True
  prompts = ["a bird", "a car"]
  out = generator.inpaint(images, mask, prompts=prompts, negative_prompts="dark", **HOW)
  np.testing.assert_array_equal(out[:, :, :8], images[:, :, :8])
  assert np.abs(out - images)[:, :, 8:].max() > 0.01
  assert generator.change_class(images, prompts=prompts, **HOW).shape == images.shape


def test_classes_and_prompts_are_not_mixed_up(generator):
  with pytest.raises(UserError, match="trained on texts, no classes: give prompts"):
    generator.generate([0])
  with pytest.raises(UserError, match="prompts is 'a bird'; give a list"):
    generator.generate(prompts="a bird")
  with pytest.raises(UserError, match="prompt 7 is no text"):
    generator.generate(prompts=[7])
  with pytest.raises(UserError, match="trained on classes, no texts: give classes"):
    test_generator.generator().generate(prompts=["a bird"])
  with pytest.raises(UserError, match="negative prompts are of a generator .* on texts"):
    test_generator.generator().generate([0], negative_prompts="dark")
  with pytest.raises(UserError, match="needs a text encoder of 8 x 16"):
    Generator(_model(), tiny.tokenizer())


def test_a_long_prompt_is_cut_with_one_warning(folder, caplog):
  generator = load_generator(folder / "generator")
  with caplog.at_level(logging.WARNING):
    for _ in range(2):
      generator.conditions(["a word after " * 9, "bird"])
  assert caplog.text.count("1 of 2 texts are longer than 6 tokens and are cut") == 1


def test_the_text_encoder_travels_or_is_named(folder, tmp_path):
  fields = weights.read_config(folder / "generator", "generator")
  inside = weights.read_config(folder / "generator" / "text_encoder", "clip-text")
  assert fields["text_encoder_fingerprint"] == inside["fingerprint"]
  card = (folder / "generator" / "README.md").read_text()
  assert "8 vectors of 16 numbers" in card and inside["fingerprint"] in card
  assert "| classes |" not in card
  save(folder)  # replaces what it wrote, the copy of the text encoder too
  apart = save(tmp_path, inside=False)
  assert not (apart / "text_encoder").exists()
  with pytest.raises(UserError, match="does not hold its text encoder.*--text-encoder DIR"):
    load_generator(apart)
  other = tiny.save_text_encoder(tmp_path / "other", seed=1)
  with pytest.raises(UserError, match="other is text encoder .* was trained with"):
    load_generator(apart, text_encoder=other)
  found = load_generator(apart, text_encoder=tmp_path / "encoder")
  assert found.conditions(["a bird", None]).shape == (2, 8, 16)
  shutil.rmtree(tmp_path / "generator")
  classes = test_generator.save(tmp_path)
  with pytest.raises(UserError, match="trained on classes: it needs no text encoder"):
    load_generator(classes, text_encoder=tmp_path / "encoder")
