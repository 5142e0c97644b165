"""Settings of the repository's config files; wrong values."""

import dataclasses

import pytest

from coda_jax import cli
from coda_jax import config as c
from coda_jax.errors import UserError
from tests.config.files import load


def test_paper_settings():
  """design.md section 2: the paper's MAR and FLUX runs."""
  mar, flux = load("configs/mar.py"), load("configs/flux.py")
  assert (mar.data.batch_size, flux.data.batch_size) == (512, 288)
  quantizers = mar.tokenizer.quantizer, flux.tokenizer.quantizer
  assert [q.codebook_size for q in quantizers] == [16384, 65536]
  assert [q.tokens for q in quantizers] == [680, 2240]
  for config in (mar, flux):
    o, q = config.optimizer, config.tokenizer.quantizer
    assert (o.learning_rate, o.b1, o.b2, o.clip) == (5e-4, 0.5, 0.9, 10.0)
    assert o.weight_decay == (("", 0.005),) and o.schedule_steps == 0
    assert (config.epochs, config.ema.decay, config.ema.start_epoch) == (10, 0.9999, 4)
    weights = config.losses
    assert (weights.l1, weights.mse, weights.perceptual) == (0.2, 1.0, 1.0)
    assert (weights.quantization, weights.entropy) == (1.0, 0.05)
    assert (q.lookup, q.norm, q.attn_dim, q.beta) == ("attention", "rms", 32, 0.05)
    assert config.tokenizer.lora.rank == 32
    adversary = config.adversarial
    assert (adversary.discriminator, adversary.weight, adversary.loss) == ("dino", 1.0, "hinge")
    assert adversary.ramp_steps == 0 and adversary.discriminator_gradient == "own"
    assert adversary.optimizer == dataclasses.replace(o, weight_decay=(("", 0.0005),))
    assert config.data.resize_ratio == 1.125 and not config.data.flip


def test_demo_with_a_discriminator():
  config, plain = load("configs/demo.py:adversarial"), load("configs/demo.py")
  assert config.adversarial.discriminator == "patch" and config.steps == 1500
  assert plain.adversarial.discriminator == "none"
  assert config.tokenizer == plain.tokenizer and config.losses == plain.losses
  assert load("configs/demo.py:attention,adversarial").tokenizer.lora is None


def test_the_demos_generator_has_few_tokens():
  tokenizer = load("configs/demo.py:thumbnails").tokenizer
  assert tokenizer.quantizer.patch_sizes[-1] * 4 == tokenizer.image_size == 32
  assert sum(p * p for p in tokenizer.quantizer.patch_sizes) == 130


def test_the_generators_of_texts():
  of = lambda arg: c.freeze(c.MaskGITTrainConfig, cli.load_config(f"configs/maskgit.py:{arg}"))
  coco = of("coco_s")
  assert (coco.model.width, coco.model.depth, coco.model.heads) == (512, 12, 8)
  assert (coco.steps, coco.data.batch_size, coco.optimizer.learning_rate) == (10**6, 256, 2e-4)
  assert coco.class_dropout == 0.1 and coco.data.text_encoder
  demo = of("text_demo")
  assert demo.data.tokenizer == "demo/shapes_tokenizer" and demo.data.text_encoder


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"data": {"bacth_size": 3}}, r"unknown key config.data.bacth_size; known here: train, eval"),
    ({"nothing": 1}, "unknown key config.nothing"),
    ({"seed": 1.5}, r"config.seed is 1.5 \(float\); it must be int"),
    ({"seed": True}, "config.seed is True"),
    ({"dtype": "float16"}, "config.dtype='float16'"),
    ({"remat": "all"}, "config.remat='all'; it is one of none, blocks"),
    ({"ema": 3}, "config.ema is 3; it must be a group of settings"),
    ({"tokenizer": {"lora": {"rank": "8"}}}, "config.tokenizer.lora.rank is '8'"),
    ({"tokenizer": {"lora": {"name_parts": "conv1"}}}, "name_parts is 'conv1'; it must be a tuple"),
    ({"trainable": (("LoRAParam",),)}, r"trainable\[0\] is .* 2 entries"),
    ({"optimizer": {"weight_decay": (("(", 0.0),)}}, "weight_decay: '\\(' is not a regular"),
    ({"optimizer": {"rates": (("[", 0.1),)}}, "rates: '\\[' is not a regular"),
    ({"optimizer": {"learning_rate": float("nan")}}, "learning_rate is nan"),
    ({"mesh": {"rules": (("", ("pipeline",)),)}}, "no mesh axis 'pipeline'"),
    ({"adversarial": {"discriminator": "gan"}}, "discriminator='gan'; it is one of none"),
    ({"data": {"batch_size": 10, "accumulation": 4}}, "batch_size=10 is not a positive multiple"),
    ({"data": {"max_unreadable": 1.0}}, "max_unreadable is 1.0; it must be at least 0 and below 1"),
    ({"kind": "maskgit"}, "config.kind='maskgit'; a tokenizer's is 'tokenizer'"),
  ],
)
def test_wrong_values_are_named(changes, message):
  fields = cli.load_config("configs/mar.py").to_dict()

  def update(target, changes):
    for key, value in changes.items():
      if isinstance(value, dict):
        update(target[key], value)
      else:
        target[key] = value

  update(fields, changes)
  with pytest.raises(UserError, match=message):
    c.freeze(c.TrainConfig, fields)


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"kind": "tokenizer"}, "config.kind='tokenizer'; a generator's is 'maskgit'"),
    ({"masking": {"order": "random"}}, "order='random'; it is one of uniform, coarse_to_fine"),
    (
      {"masking": {"level_balance": 2.0}},
      "level_balance is 2.0; it must be at least 0 and at most 1",
    ),
    ({"class_dropout": -0.1}, "config.class_dropout is -0.1; it must be at least 0"),
    ({"data": {"accumulation": 3}}, "batch_size=2048 is not a positive multiple"),
  ],
)
def test_wrong_values_of_a_generator_are_named(changes, message):
  data = {"tokenizer": "t", "train": "a"} | changes.pop("data", {})
  with pytest.raises(UserError, match=message):
    c.freeze(c.MaskGITTrainConfig, {"data": data} | changes)
