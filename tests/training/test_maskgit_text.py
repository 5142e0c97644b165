"""Training a generator on captions and on their embeddings: one update, and what belongs to it."""

import csv
import dataclasses

import jax
import numpy as np
import pytest

from coda_jax import config as c
from coda_jax import text, tokenize_dataset, weights
from coda_jax.errors import UserError
from coda_jax.generation.generator import load_generator
from coda_jax.training.logging import read_metrics
from tests import tiny
from tests.conftest import assert_close
from tests.exporting import check
from tests.training import runs
from tests.training.test_maskgit_trainer import config as classes
from tests.training.test_maskgit_trainer import make_trainer, one_step, train

KINDS = ("captions", "embeddings")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Tokens with captions in `captions/SPLIT`, with embeddings in `embeddings/SPLIT`."""
  folder = tmp_path_factory.mktemp("texts")
  runs.make_inputs(folder)
  weights.save_tokenizer(tiny.tokenizer(), folder / "tokenizer")
  tiny.save_text_encoder(folder / "encoder")
  for split, count in (("train", 24), ("val", 6)):
    with (folder / "images" / split / "metadata.csv").open("w", newline="") as file:
      out = csv.writer(file)
      out.writerow(["file_name", "caption"])
      for i in range(count):
        out.writerows([f"one/{i}.png", f"a {'red' if i % 2 else 'blue'} image"] for _ in range(2))
    for kind in KINDS:
      words = ["--tokenizer", folder / "tokenizer", "--data", f"folder:{folder}/images@{split}"]
      words += ["--output", folder / kind / split, "--batch-size", "8", "--text", kind]
      words += ["--text-encoder", folder / "encoder"] if kind == "embeddings" else []
      tokenize_dataset.run(tokenize_dataset.parser().parse_args([str(w) for w in words]))
  return folder


def config(folder, kind, **changes):
  settings = classes(folder, class_dropout=0.1, steps=4, model__depth=0)
  data = dataclasses.replace(
    settings.data,
    train=str(folder / kind / "train"),
    eval="",
    text_encoder=str(folder / "encoder"),
  )
  return c.changed(dataclasses.replace(settings, data=data), **changes)


@pytest.fixture(scope="module")
def trainers(folder):
  return {kind: make_trainer(config(folder, kind)) for kind in KINDS}


def test_captions_learn_and_generate(folder, trainers, tmp_path):
  trainer = trainers["captions"]
  assert train(trainer, tmp_path)
  losses = [r["loss"] for r in read_metrics(tmp_path) if r["kind"] == "train"]
  assert len(losses) == 4 and losses[-1] < losses[0]
  assert not [k for k in trainer.abstract_state().params if "empty" in k or "token_emb" in k]
  saved = weights.read_arrays(tmp_path / "generator")
  encoder = text.load_text_encoder(folder / "encoder")
  assert_close(saved["condition.empty"], encoder.encode([""])[0], 1e-5)
  generator = load_generator(tmp_path / "generator")
  assert generator.config.text and generator.class_names == ()
  assert generator.conditions(["a red image"]).shape == (1, 8, 16)
  assert trainer._step._cache_size() == 1


@pytest.mark.slow
def test_embeddings_are_the_same_update(trainers):
  (params, metrics), (others, theirs) = (one_step(trainers[kind]) for kind in KINDS)
  assert_close(metrics["loss"], theirs["loss"], 1e-3)
  assert_close(metrics["grad_norm"], theirs["grad_norm"], 1e-2)
  assert params.keys() == others.keys()


def test_embeddings_bring_the_empty_text(folder, trainers):
  trainer = make_trainer(config(folder, "embeddings", data__text_encoder=""))
  ours, theirs = trainer.conditions, trainers["captions"].conditions
  assert_close(ours.fixed["condition.empty"], theirs.fixed["condition.empty"], 1e-3)
  assert ours.text_encoder == theirs.text_encoder and not ours.text_encoder_dir


@pytest.mark.slow
def test_embeddings_need_no_text_encoder(folder, tmp_path):
  held_out = str(folder / "embeddings" / "val")
  changes = {"data__text_encoder": "", "data__eval": held_out, "eval__batch_size": 8}
  trainer = make_trainer(config(folder, "embeddings", **changes))
  assert train(trainer, tmp_path)
  assert [r for r in read_metrics(tmp_path) if r["kind"] == "eval"]
  assert not (tmp_path / "generator" / "text_encoder").exists()
  found = load_generator(tmp_path / "generator", text_encoder=folder / "encoder")
  assert found.config.text


@pytest.mark.parametrize(
  ("kind", "changes", "message"),
  [
    ("captions", {"data__text_encoder": ""}, "have captions: config.data.text_encoder names"),
    ("captions", {"data__text_encoder": "tokenizer"}, "give the directory of a text encoder"),
    ("captions", {"data__eval": "embeddings/val"}, "with captions, .* with embeddings of captions"),
    ("embeddings", {"data__text_encoder": "other"}, "were embedded by text encoder .*other is"),
    ("embeddings", {"model__num_classes": 3}, "num_classes=3, but the tokens .* have texts"),
    ("classes", {"data__text_encoder": "encoder"}, "have no captions; .*--text captions"),
  ],
)
def test_errors_name_both(folder, monkeypatch, kind, changes, message):
  monkeypatch.chdir(folder)
  if not (folder / "other").exists():
    tiny.save_text_encoder(folder / "other", seed=1)
    words = ["--tokenizer", "tokenizer", "--data", "folder:images@train", "--batch-size", "8"]
    words += ["--output", "classes/train"]
    tokenize_dataset.run(tokenize_dataset.parser().parse_args(words))
  with pytest.raises(UserError, match=message):
    make_trainer(config(folder, kind, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_eight_devices_equal_one(folder, trainers, kind):
  _, metrics = one_step(trainers[kind])
  changes = {"mesh__fsdp": 2, "mesh__model": 2}
  _, sharded = one_step(make_trainer(config(folder, kind, **changes), devices=8))
  assert_close(sharded["loss"], metrics["loss"], 1e-5)
  assert_close(sharded["grad_norm"], metrics["grad_norm"], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_exported_for_every_platform(trainers, kind):
  trainer = trainers[kind]
  with jax.set_mesh(trainer.mesh):
    batches = trainer.batches(0)
    batch, state = next(batches), trainer.initial_state()
    batches.close()
  assert batch["condition"].dtype == (np.int32 if kind == "captions" else np.float16)
  check(trainer._keyed_update, state, trainer._frozen, trainer._key, batch, tolerance=1e-4)
