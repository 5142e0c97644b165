"""Training a generator: masks, resume to the bit, devices, errors."""

import dataclasses

import jax
import numpy as np
import pytest

from coda_jax import config as c
from coda_jax import sharding, tokenize_dataset, weights
from coda_jax.errors import UserError
from coda_jax.training import loop
from coda_jax.training.logging import read_metrics
from coda_jax.training.maskgit_trainer import MaskGITTrainer
from tests import tiny
from tests.conftest import assert_close
from tests.exporting import check
from tests.training import runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("generator")
  runs.make_inputs(folder)
  weights.save_tokenizer(tiny.tokenizer(), folder / "tokenizer")
  for split in ("train", "val"):
    words = ["--tokenizer", folder / "tokenizer", "--data", f"folder:{folder}/images@{split}"]
    words += ["--output", folder / split, "--batch-size", "8"]
    tokenize_dataset.run(tokenize_dataset.parser().parse_args([str(w) for w in words]))
  return folder


def config(folder, **changes) -> c.MaskGITTrainConfig:
  data = c.TokenDataSettings(
    *(str(folder / name) for name in ("tokenizer", "train", "val")), batch_size=8
  )
  settings = c.MaskGITTrainConfig(
    data=data,
    model=c.MaskGITSettings(width=32, depth=2, heads=2),
    steps=6,
    dtype="float32",
    optimizer=c.OptimizerSettings(learning_rate=1e-3, warmup_steps=0, clip=1.0),
    ema=c.EMASettings(decay=0.5, start_epoch=0),
    eval=c.EvalSettings(batch_size=8, lpips=False),
    checkpoint=c.CheckpointSettings(every=2, best_metric="-loss"),
    logging=c.LoggingSettings(every=1, tensorboard=False),
  )
  return c.changed(settings, **changes)


def make_trainer(config, devices=1):
  return MaskGITTrainer(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))


@pytest.fixture(scope="module")
def trainer(folder):
  return make_trainer(config(folder))


def train(trainer, workdir):
  return loop.run(trainer, workdir, trainer.config.checkpoint, trainer.config.logging, {})


@pytest.fixture(scope="module")
def finished(trainer, tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  assert train(trainer, workdir)
  return workdir


@pytest.mark.slow
def test_it_learns_and_exports(folder, finished):
  losses = [r["loss"] for r in read_metrics(finished) if r["kind"] == "train"]
  assert len(losses) == 6 and losses[-1] < losses[0]
  model, fields = weights.load_generator_weights(finished / "generator")
  assert fields["class_names"] == ["one"] and model.config.patch_sizes == (1, 2, 3, 8)
  codes = tiny.tokenizer().quantizer.values()
  assert model.output_table()[0].shape[0] == len(codes)
  ours = weights.read_config(finished / "generator" / "tokenizer", "tokenizer")
  assert ours == weights.read_config(folder / "tokenizer", "tokenizer")
  assert weights.is_averaged(finished / "generator")


def test_continues_to_the_bit_and_compiles_once(trainer, finished, tmp_path, monkeypatch):
  step, done = trainer.step, []

  def fails_at_the_fourth(state, batch):
    if len(done) == 3:
      raise KeyboardInterrupt
    done.append(1)
    return step(state, batch)

  monkeypatch.setattr(trainer, "step", fails_at_the_fourth)
  with pytest.raises(KeyboardInterrupt):
    train(trainer, tmp_path)
  monkeypatch.setattr(trainer, "step", step)
  assert train(trainer, tmp_path)
  a, b = (weights.read_arrays(path / "generator") for path in (tmp_path, finished))
  assert a.keys() == b.keys()
  for key in a:
    np.testing.assert_array_equal(a[key], b[key], err_msg=key)
  assert trainer._step._cache_size() == 1


def one_step(trainer):
  with jax.set_mesh(trainer.mesh):
    batches = trainer.batches(0)
    state, metrics = trainer.step(trainer.initial_state(), next(batches))
    batches.close()
    return jax.device_get(state.params), jax.device_get(metrics)


@pytest.mark.slow
def test_eight_devices_equal_one(folder, trainer):
  params, metrics = one_step(trainer)
  changes = {"mesh__fsdp": 2, "mesh__model": 2}
  sharded_params, sharded = one_step(make_trainer(config(folder, **changes), devices=8))
  assert_close(sharded["loss"], metrics["loss"], 1e-5)
  assert_close(sharded["level_loss"], metrics["level_loss"], 1e-5)
  assert_close(sharded["grad_norm"], metrics["grad_norm"], 1e-4)


@pytest.mark.slow
def test_the_update_is_exported_for_every_platform(trainer):
  with jax.set_mesh(trainer.mesh):
    batches = trainer.batches(0)
    batch, state = next(batches), trainer.initial_state()
    batches.close()
  check(trainer._keyed_update, state, trainer._frozen, trainer._key, batch, tolerance=1e-4)


def test_errors_name_both(folder, tmp_path):
  weights.save_tokenizer(tiny.tokenizer(seed=1), tmp_path / "other")
  with pytest.raises(UserError, match="were made by tokenizer"):
    make_trainer(config(folder, data__tokenizer=str(tmp_path / "other")))
  quantizer = dataclasses.replace(tiny.QUANTIZER, codebook_size=32)
  other = dataclasses.replace(tiny.TOKENIZER, quantizer=quantizer)
  weights.save_tokenizer(tiny.tokenizer(other), tmp_path / "small")
  with pytest.raises(UserError, match="codebook_size 64, .*small has 32"):
    make_trainer(config(folder, data__tokenizer=str(tmp_path / "small")))
  with pytest.raises(UserError, match="'factors'.*codes have none"):
    make_trainer(config(folder, model__embedding="factors"))
  with pytest.raises(UserError, match="num_classes=7"):
    make_trainer(config(folder, model__num_classes=7))
  with pytest.raises(UserError, match="accumulation"):
    config(folder, data__accumulation=3)
