"""What a workdir may be continued with."""

import dataclasses

import pytest

from coda_jax import config as c
from coda_jax.config.resume import with_defaults
from coda_jax.errors import UserError
from tests.config.files import load


def test_what_may_change_on_resume():
  there = c.to_json(load())
  allowed = load(
    "configs/mar.py",
    "--config.steps=7",
    "--config.epochs=3",
    "--config.mesh.fsdp=2",
    "--config.logging.every=1",
    "--config.checkpoint.keep=5",
    "--config.data.workers=2",
    "--config.data.max_unreadable=0.1",
    "--config.remat=blocks",
  )
  c.check_resumable(allowed, there, "runs/mar")
  seed = dataclasses.replace(allowed, seed=1)
  with pytest.raises(UserError, match=r"runs/mar holds .*: seed \(there 42, here 1\); take a new"):
    c.check_resumable(seed, there, "runs/mar")
  smaller = load("configs/mar.py:attention,codebook_size=1024")
  with pytest.raises(UserError, match="tokenizer.lora .* tokenizer.quantizer.codebook_size"):
    c.check_resumable(smaller, there, "runs/mar")


def test_a_workdir_of_an_older_version_continues():
  """It lacks newer keys, whole groups among them, and has `fold` and another `remat`."""
  there = c.to_json(load())
  for key in ("kind", "ema", "trainable"):
    del there[key]
  del there["adversarial"]["optimizer"]["rates"]
  del there["tokenizer"]["lora"]["encoder"]
  del there["data"]["flip"]
  c.check_resumable(load(), there | {"fold": True, "remat": "auto"}, "runs/mar")


def test_what_an_older_version_lacks_has_its_default():
  there = c.to_json(load())
  del there["ema"]
  there["invented"] = 3
  changed = load("configs/mar.py", "--config.ema.decay=0.5")
  with pytest.raises(UserError, match=r"ema.decay \(there 0.9999, here 0.5\), invented \(there 3"):
    c.check_resumable(changed, there, "runs/mar")
  del there["invented"], there["tokenizer"]["vae"]  # `vae` has no default
  with pytest.raises(UserError, match=r": tokenizer.vae \(there null, here \"checkpoints/mar_vae"):
    c.check_resumable(load(), there, "runs/mar")


def test_defaults_of_a_missing_group_are_those_of_its_owner():
  """A generator's optimizer has other defaults than `OptimizerSettings`."""
  data = {"tokenizer": "t", "train": "a"}
  filled = with_defaults(c.MaskGITTrainConfig, {"data": data})
  assert filled == c.to_json(c.freeze(c.MaskGITTrainConfig, {"data": data}))
  assert filled["optimizer"]["learning_rate"] == 4e-4
