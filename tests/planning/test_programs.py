"""Programs from shapes alone are those of a run that reads its weights and data."""

import dataclasses

import jax
import pytest

from coda_jax import cli, sharding, weights
from coda_jax import config as c
from coda_jax.data import tokens
from coda_jax.errors import UserError
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.tokenizer import TokenizerConfig
from coda_jax.models.vae import FLUX2_VAE, FLUX_VAE, MAR_VAE, SD_VAE
from coda_jax.planning import inputs, programs
from coda_jax.training import registry
from tests import tiny
from tests.training import runs

TINY = TokenizerConfig(runs.VAE, QuantizerConfig(8, (1, 2), chunk_size=8), image_size=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  runs.make_inputs(folder)
  return folder


@pytest.mark.slow
def test_an_update_is_the_trainers(folder):
  settings = runs.config(folder, mesh__fsdp=2, data__accumulation=2, ema__start_epoch=0)
  devices = jax.devices()[:4]
  trainer = registry.make_trainer(settings, sharding.make_mesh(settings.mesh, devices))
  batches = trainer.batches(0)
  with jax.set_mesh(trainer.mesh):
    state, batch = trainer.initial_state(), next(batches)
    theirs = trainer._step.lower(state, trainer._frozen, trainer._key, batch).as_text()
  batches.close()
  program = programs.make("update", settings, devices)
  assert program.lower().as_text() == theirs
  assert program.images == 8 and program.steps == 6
  leaves = jax.tree.leaves(program.args)
  assert all(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
  groups = jax.tree.leaves(program.groups)
  assert len(groups) == len(leaves) - 1  # all but the key


@pytest.mark.parametrize("what", ["eval", "encode"])
def test_programs_of_a_tokenizer(folder, what):
  program = programs.make(what, runs.config(folder), jax.devices()[:2])
  assert program.images == 8 and "func.func public @main" in program.lower().as_text()


@pytest.fixture(scope="module")
def generator():
  spec = "configs/maskgit.py:demo"
  words = ["--config.model.depth=2", "--config.model.width=16"]
  return registry.resolve(cli.load_config(spec, words))


@pytest.fixture(scope="module")
def tokenizer():
  return registry.resolve(cli.load_config("configs/demo.py:thumbnails"))


@pytest.mark.parametrize("what", ["update", "eval", pytest.param("sample", marks=pytest.mark.slow)])
def test_programs_of_a_generator(generator, tokenizer, what):
  program = programs.make(what, generator, jax.devices()[:4], tokenizer)
  out = jax.eval_shape(program.function, *program.args)
  if what == "sample":
    assert out.shape == (8, 32, 32, 3)
  program.lower()


def test_a_generator_whose_tokenizer_starts_from_another(generator, folder, tmp_path):
  """The start's quantizer, VAE and image size count; adapters are added."""
  weights.save_tokenizer(tiny.tokenizer(TINY), tmp_path / "start")
  start = {"tokenizer__start": str(tmp_path / "start"), "tokenizer__vae": "nowhere"}
  training = registry.resolve(c.config_dict(runs.config(folder, **start)))
  settings = inputs.stand_in(generator, tmp_path, training)
  found = weights.read_tokenizer_config(settings.data.tokenizer)
  assert found == dataclasses.replace(TINY, lora=runs.LORA)
  assert tokens.TokenSource(settings.data.train).manifest["patch_sizes"] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["captions", "embeddings"])
def test_programs_of_a_generator_of_texts(kind, tmp_path, monkeypatch):
  monkeypatch.setattr(inputs, "CLIPTextConfig", lambda: tiny.TEXT)  # CLIP's own is half a GB
  words = ["--config.model.depth=0", "--config.model.width=16", "--config.data.batch_size=16"]
  settings = registry.resolve(cli.load_config("configs/maskgit.py:text_demo", words))
  if kind == "embeddings":  # of tokens that are there
    encoder = {"kind": "clip-text", "fingerprint": "x"}
    text = {"kind": kind, "encoder": encoder, "tokens": 8, "width": 16, "padding": "end"}
    fields = {"fingerprint": "y", "quantizer": {"patch_sizes": [1, 2], "codebook_size": 8}}
    inputs.write_tokens(tmp_path / "tokens", fields, [], text)
    settings = c.changed(settings, data__train=str(tmp_path / "tokens"))
  tokenizer = registry.resolve(cli.load_config("configs/demo.py"))
  program = programs.make("update", settings, jax.devices()[:4], tokenizer)
  shape = program.groups["batch"]["condition"]
  assert shape.shape == ((1, 16, 8) if kind == "captions" else (1, 16, 8, 16))
  assert ("text_encoder" in program.groups["frozen"]) == (kind == "captions")
  jax.eval_shape(program.function, *program.args)
  program = programs.make("sample", settings, jax.devices()[:4], tokenizer)
  assert jax.eval_shape(program.function, *program.args).shape == (8, 64, 64, 3)


def test_what_is_not_there_and_not_known(folder, generator):
  settings = runs.config(folder, tokenizer__vae="nowhere", tokenizer__image_size=48)
  with pytest.raises(UserError, match="vae=nowhere is not there.*MAR's, FLUX's, .*the demo's"):
    programs.make("update", settings, jax.devices()[:2])
  with pytest.raises(UserError, match="--tokenizer-config=configs/mar.py"):
    programs.make("update", generator, jax.devices()[:2])


def test_a_batch_that_the_mesh_does_not_divide(folder):
  with pytest.raises(UserError, match="a micro-batch is 8 images"):
    programs.make("update", runs.config(folder), jax.devices()[:3])


def test_vaes_by_the_latents_that_a_quantizer_takes(folder):
  for name, vae in (
    ("mar.py", MAR_VAE),
    ("mar.py:512", MAR_VAE),
    ("flux.py", FLUX_VAE),
    ("flux.py:512", FLUX_VAE),
    ("flux.py:flux2", FLUX2_VAE),
    ("sd.py", SD_VAE),
    ("demo.py", inputs.DEMO_VAE),
  ):
    settings = registry.resolve(cli.load_config(f"configs/{name}"))
    assert inputs.vae_config(settings.tokenizer) == vae
  there = runs.config(folder, tokenizer__quantizer=QuantizerConfig(4, (1,)))
  assert inputs.vae_config(there.tokenizer) == runs.VAE
