"""Training a generator on captions and on their embeddings: one update, and what belongs to it."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from coda_jax import config as c
from coda_jax import text, weights
from coda_jax.data import records, tokens
from coda_jax.errors import UserError
from coda_jax.generation.generator import load_generator
from coda_jax.training.logging import read_metrics
from tests import tiny
from tests.conftest import assert_close
from tests.exporting import check
from tests.training.test_maskgit_trainer import config as classes
from tests.training.test_maskgit_trainer import make_trainer, one_step, train

KINDS = ("captions", "embeddings")


def write(path, fields, encoder, kind):
  """Random tokens of 24 images, with two captions each, their embeddings, or classes."""
  rng, q = np.random.default_rng(0), fields["quantizer"]
  ids = rng.integers(0, q["codebook_size"], (24, sum(p * p for p in q["patch_sizes"])), np.uint16)
  file, number = "tokens-00000-of-00001.array_record", np.arange(24)
  labels = np.zeros(24, np.int32) if kind == "classes" else np.stack([0 * number, 2 * number], 1)
  if kind != "classes":
    labels = np.concatenate([labels, 2 + 0 * labels[:, :1]], 1)
  captions = [f"a {'red' if i % 4 < 2 else 'blue'} image" for i in range(48)]
  path.mkdir(parents=True)
  manifest = {
    "format": tokens.FORMAT,
    "complete": True,
    "tokenizer": fields["fingerprint"],
    "patch_sizes": q["patch_sizes"],
    "codebook_size": q["codebook_size"],
    "class_names": ["one"],
    "shards": [{"file": file, "images": 24, "captions": 48}],
  }
  if kind != "classes":
    manifest["text"] = {"kind": kind}
    texts = [caption.encode() for caption in captions]
    if kind == "embeddings":
      made = encoder.encode([*captions, ""]).astype(np.float16)
      texts = [x.tobytes() for x in made[:-1]]
      np.save(path / "empty.npy", made[-1])
      shape = {"tokens": encoder.tokens, "width": encoder.width, "empty": "empty.npy"}
      of = {"kind": encoder.kind, "fingerprint": encoder.fingerprint}
      manifest["text"] |= {"encoder": of, **shape}
    records.write(path / tokens.text_file(file), texts)
  records.write(path / file, [tokens.pack(ids, labels.astype(np.int32))])
  (path / tokens.MANIFEST).write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Tokens with captions, with embeddings and with classes, by these names."""
  folder = tmp_path_factory.mktemp("texts")
  weights.save_tokenizer(tiny.tokenizer(), folder / "tokenizer")
  encoder = text.load_text_encoder(tiny.save_text_encoder(folder / "encoder"))
  for kind in (*KINDS, "classes"):
    write(folder / kind, weights.read_config(folder / "tokenizer", "tokenizer"), encoder, kind)
  return folder


def config(folder, kind, **changes):
  settings = classes(folder, class_dropout=0.1, steps=4, model__depth=0)
  data = dataclasses.replace(
    settings.data,
    train=str(folder / kind),
    eval="",
    text_encoder=str(folder / "encoder"),
  )
  return c.changed(dataclasses.replace(settings, data=data), **changes)


@pytest.fixture(scope="module")
def trainers(folder):
  return {kind: make_trainer(config(folder, kind)) for kind in KINDS}


@pytest.mark.slow
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
  changes = {"data__text_encoder": "", "data__eval": str(folder / "embeddings")}
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
    ("captions", {"data__eval": "embeddings"}, "with captions, .* with embeddings of captions"),
    ("embeddings", {"data__text_encoder": "other"}, "were embedded by text encoder .*other is"),
    ("embeddings", {"model__num_classes": 3}, "num_classes=3, but the tokens .* have texts"),
    ("classes", {"data__text_encoder": "encoder"}, "have no captions; .*--text captions"),
  ],
)
def test_errors_name_both(folder, monkeypatch, kind, changes, message):
  monkeypatch.chdir(folder)
  if not (folder / "other").exists():
    tiny.save_text_encoder(folder / "other", seed=1)
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
