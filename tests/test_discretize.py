"""From a VAE's directory to a tokenizer that every command takes."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import coda_jax
from coda_jax import cli, discretize, pretrained, sharding, tokenize_dataset, visualize, weights
from coda_jax import config as c
from coda_jax import eval as evaluation
from coda_jax.cards import FILE
from coda_jax.data.tokens import TokenSource
from coda_jax.errors import UserError
from coda_jax.generation.generator import Generator, load_generator
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from coda_jax.models.vae import AutoencoderKL
from coda_jax.training import loop
from coda_jax.training.logging import read_metrics
from coda_jax.training.maskgit_trainer import MaskGITTrainer
from convert import api as convert
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A VAE, photos of two classes, and the tokenizer that the command makes of them."""
  path = tmp_path_factory.mktemp("discretize")
  make = lambda: AutoencoderKL(tiny.VAE, rngs=nnx.Rngs(0))
  weights.save_vae(weights.build(make, tiny.random_params(make), "test"), path / "vae")
  rng = np.random.default_rng(0)
  for name in "ab":
    (path / "photos" / "train" / name).mkdir(parents=True)
    for i in range(4):
      image = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize((24, 24))
      image.save(path / "photos" / "train" / name / f"{i}.png")
  run(path, "--output", path / "tokenizer")
  return path


def run(folder, *words):
  data = ["--vae", folder / "vae", "--data", f"folder:{folder}/photos@train"]
  numbers = [
    "--bits",
    "400",
    "--block",
    "2",
    "--image-size",
    "16",
    "--images",
    "24",
    "--gradients",
    "8",
  ]
  args = [*data, *numbers, "--codes", "64", *words]
  discretize.run(discretize.parser().parse_args(list(map(str, args))))


@pytest.fixture(scope="module")
def tokenizer(folder):
  return coda_jax.load_tokenizer(folder / "tokenizer")


def test_the_directory_is_a_tokenizer(folder, tokenizer):
  config = tokenizer.config.quantizer
  assert 350 < tokenizer.bits_per_image <= 400
  assert tokenizer.codebook_size == sum(config.level_codes) and max(config.level_codes) <= 64
  x = tiny.images(2, 16, 16)
  ids = tokenizer.encode(x)
  made = tokenizer.decode(ids)
  assert made.shape == x.shape
  rows = tokenizer.flatten(ids)
  for a, b in zip(tokenizer.unflatten(rows), ids, strict=True):
    np.testing.assert_array_equal(a, b)
  assert tokenizer.config.quantizer.level_sizes(8, 16)[0] == (4, 8)
  card = (folder / "tokenizer" / FILE).read_text()
  assert "without training, by vq" in card and f"{config.bits:,.0f} bits" in card
  weights.save_tokenizer(tokenizer, folder / "again")
  same = weights.fingerprint_of(folder / "again", "tokenizer")
  assert same == weights.fingerprint_of(folder / "tokenizer", "tokenizer")


@pytest.mark.slow
def test_the_same_again_and_what_it_prints(folder, capsys):
  run(folder, "--output", folder / "second", "--block", "1")
  out = capsys.readouterr().out
  assert "taken 1x1" in out and "the bound for Gaussians" in out and out.endswith("second\n")
  run(folder, "--output", folder / "second", "--block", "1", "--overwrite")
  assert capsys.readouterr().out == out


@pytest.mark.slow
def test_the_papers_quantizer_from_data_goes_to_torch(folder, tmp_path):
  vae, data = folder / "vae", f"folder:{folder}/photos@train"
  side, _ = weights.load_vae(vae).config.latent_size(16, 16)
  sizes = f"1,2,{side}"
  words = ["--method", "coda", "--image-size", "16", "--images", "24", "--gradients", "8"]
  words += ["--vae", vae, "--data", data, "--bits", "600", "--patch-sizes", sizes]
  words += ["--output", tmp_path / "made"]
  discretize.run(discretize.parser().parse_args(list(map(str, words))))
  made = coda_jax.load_tokenizer(tmp_path / "made")
  assert made.config.quantizer.lookup == "attention" and made.bits_per_image <= 600
  convert.to_torch(tmp_path / "made", tmp_path / "made.pt")


@pytest.mark.parametrize(
  ("words", "message"),
  [
    (["--patch-sizes", "1,2"], "--patch-sizes is for --method coda"),
    (["--method", "coda"], "--method coda has no --block"),
  ],
)
def test_options_of_the_other_method_are_refused(folder, tmp_path, words, message):
  with pytest.raises(cli.UsageError, match=message):
    run(folder, "--output", tmp_path / "out", *words)


@pytest.mark.slow
def test_commands_take_it(folder, tokenizer, monkeypatch):
  monkeypatch.setattr(pretrained, "find_lpips", lambda path: (None, "LPIPS is left out"))
  data = ["--tokenizer", folder / "tokenizer", "--data", f"folder:{folder}/photos@train"]
  for module, name in ((evaluation, "eval"), (visualize, "report")):
    words = [*data, "--output", folder / name, "--batch-size", "8"]
    module.run(module.parser().parse_args(list(map(str, words))))
  found = json.loads((folder / "eval" / "results.json").read_text())["entries"]["tokenizer"]
  np.testing.assert_allclose(found["codebook"]["bits_per_image"], tokenizer.bits_per_image)
  assert max(x["utilization"] for x in found["codebook"]["levels"]) > 0.2
  assert (folder / "report" / "report.html").is_file()
  words = [*data, "--output", folder / "tokens", "--batch-size", "8"]
  tokenize_dataset.run(tokenize_dataset.parser().parse_args(list(map(str, words))))
  assert TokenSource(str(folder / "tokens")).tokens == tokenizer.tokens_per_image


@pytest.mark.slow
@pytest.mark.parametrize("embedding", ["codes", "factors"])
def test_a_generator_draws_ids_of_each_level(tokenizer, embedding):
  q = tokenizer.config.quantizer
  config = MaskGITConfig(
    width=16,
    depth=0,
    heads=2,
    num_classes=2,
    patch_sizes=q.patch_sizes,
    codebook_size=q.codebook_size,
    code_dim=q.code_dim,
    embedding=embedding,
    level_codes=q.level_codes,
    factor_codes=q.factor_codes,
  )
  codes = jax.jit(lambda: tokenizer.quantizer.embedding_values())()
  model = nnx.jit(lambda: MaskGIT(config, codes=codes, rngs=nnx.Rngs(0)))()
  generator = Generator(model, tokenizer)
  masked = np.full((3, config.tokens), config.mask_id, np.int32)
  settings = coda_jax.generation.sampler.SamplerSettings(steps=2, top_k=50)
  ids = np.asarray(generator.sample(masked, [0, 1, None], settings, jax.random.key(0)).ids)
  for level, (first, end) in enumerate(q.ranges):
    of_level = ids[:, config.levels == level]
    assert first <= of_level.min() and of_level.max() < end
  images = generator.decode(ids)
  np.testing.assert_allclose(images, tokenizer.decode(ids), atol=1e-5)
  changed = generator.inpaint(images.clip(-1, 1), np.eye(16, dtype=bool), [0, 0, 0], steps=2)
  assert changed.shape == images.shape


def test_what_it_refuses(folder, tmp_path):
  with pytest.raises(UserError, match="no vq look-up"):
    convert.to_torch(folder / "tokenizer", tmp_path / "torch")
  with pytest.raises(UserError, match="holds a 'tokenizer', not a 'vae'"):
    run(folder, "--vae", folder / "tokenizer", "--output", tmp_path / "out")
  with pytest.raises(UserError, match="8x8 cannot be cut into blocks of 5x5"):
    run(folder, "--block", "5", "--output", tmp_path / "out")
  with pytest.raises(UserError, match="not a multiple"):
    run(folder, "--image-size", "17", "--output", tmp_path / "out")
  with pytest.raises(UserError, match="exists"):
    run(folder, "--output", folder / "tokenizer")
  assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_generator_of_factors_trains_and_loads(folder, tmp_path):
  words = ["--tokenizer", folder / "tokenizer", "--data", f"folder:{folder}/photos@train"]
  words += ["--output", tmp_path / "tokens", "--batch-size", "8"]
  tokenize_dataset.run(tokenize_dataset.parser().parse_args(list(map(str, words))))
  data = c.TokenDataSettings(
    str(folder / "tokenizer"), *[str(tmp_path / "tokens")] * 2, batch_size=8
  )
  settings = c.MaskGITTrainConfig(
    data=data,
    model=c.MaskGITSettings(width=16, depth=2, heads=2, embedding="factors"),
    steps=2,
    dtype="float32",
    eval=c.EvalSettings(batch_size=8, lpips=False),
    logging=c.LoggingSettings(tensorboard=False),
  )
  trainer = MaskGITTrainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))
  assert loop.run(trainer, tmp_path / "run", settings.checkpoint, settings.logging, {})
  q = trainer.model_config
  untrained = [r for r in read_metrics(tmp_path / "run") if r["kind"] == "eval"][0]["bits"]
  assert 0.9 < untrained / coda_jax.load_tokenizer(folder / "tokenizer").bits_per_image < 1.1
  generator = load_generator(tmp_path / "run" / "generator")
  assert generator.config == q and len(generator.config.factor_codes) > len(q.patch_sizes)
  assert generator.generate([0, 1], steps=2).shape == (2, 16, 16, 3)
