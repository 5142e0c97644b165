"""The rows of the paper's Table 1."""

import dataclasses

import pytest

from coda_jax.errors import UserError
from coda_jax.models.tokenizer import TokenizerConfig
from coda_jax.models.vae import FLUX2_VAE, FLUX_VAE, MAR_VAE, SD3_VAE, SD_VAE
from tests.config.files import load


def test_variants():
  vq, rq = load("configs/mar.py:vq"), load("configs/mar.py:rq")
  for config in (vq, rq):
    assert config.tokenizer.quantizer.lookup == "euclidean" and config.tokenizer.lora is None
  assert vq.tokenizer.quantizer.patch_sizes == (16,)
  assert len(rq.tokenizer.quantizer.patch_sizes) == 10
  attention = load("configs/flux.py:attention").tokenizer
  assert attention.quantizer.lookup == "attention" and attention.lora is None
  full = load("configs/mar.py:full,codebook_size=65536,norm=layer").tokenizer
  assert full.quantizer.codebook_size == 65536 and full.quantizer.norm == "layer"
  assert full.lora is not None
  rotation = load("configs/mar.py:rq,rotation").tokenizer.quantizer
  assert rotation == dataclasses.replace(rq.tokenizer.quantizer, gradient="rotation")
  for lookup in ("product", "ibq", "fsq", "lfq", "bsq"):
    codes = 1000 if lookup == "fsq" else 1024
    further = load(f"configs/demo.py:{lookup}").tokenizer
    assert (further.quantizer.lookup, further.quantizer.codebook_size) == (lookup, codes)
    assert further.lora is not None
  assert load("configs/mar.py:codebook_size=65536,fsq").tokenizer.quantizer.codebook_size == 64000
  with pytest.raises(UserError, match="quantizer.gradient is 'rotation'"):
    load("configs/mar.py:rotation")
  for arg in ("nothing", "codebook_size=many", "size=3"):
    with pytest.raises(UserError, match=f"config argument '{arg}'"):
      load(f"configs/mar.py:{arg}")
  with pytest.raises(UserError, match="codebook_size is 0"):
    load("configs/mar.py:codebook_size=0")


@pytest.mark.parametrize(
  ("spec", "vae", "size", "last", "tokens", "accumulation"),
  [
    ("mar.py:512", MAR_VAE, 512, 32, 2240, 16),
    ("mar.py:vq,512", MAR_VAE, 512, 32, 1024, 16),
    ("flux.py:512", FLUX_VAE, 512, 64, 9451, 12),
    ("flux.py:128", FLUX_VAE, 128, 16, 680, 3),
    ("flux.py:flux2", FLUX2_VAE, 256, 32, 2240, 3),
    ("flux.py:flux2,512,norm=layer", FLUX2_VAE, 512, 64, 9451, 12),
    ("sd.py", SD_VAE, 256, 32, 2240, 3),
    ("sd.py:sd3,512", SD3_VAE, 512, 64, 9451, 12),
  ],
)
def test_vaes_and_sizes(spec, vae, size, last, tokens, accumulation):
  config = load(f"configs/{spec}")
  settings, data = config.tokenizer, config.data
  assert settings.quantizer.patch_sizes[-1] == last and settings.quantizer.tokens == tokens
  assert data.accumulation == accumulation and data.batch_size % data.accumulation == 0
  TokenizerConfig(vae=vae, quantizer=settings.quantizer, image_size=settings.image_size)
  assert settings.image_size == size


def test_sizes_without_patch_sizes():
  for size in ("384", "0", "1000"):
    with pytest.raises(UserError, match=f"'{size}': images of 128, 256, 512 pixels have patch"):
      load(f"configs/flux.py:{size}")


@pytest.mark.parametrize("name", ["mar", "flux"])
def test_recipes_that_start_from_discretize(name):
  paper = load(f"configs/{name}.py")
  for arg, start in (("", "free"), (":half", "free_half"), (":data", "data")):
    config = load(f"configs/best_{name}.py{arg}")
    assert config.tokenizer.start == f"checkpoints/{name}_{start}" and config.epochs == 2
    assert config.ema.start_epoch < config.epochs
    assert config.tokenizer.lora == paper.tokenizer.lora
    assert (config.trainable == paper.trainable) == (arg == ":data")
  with pytest.raises(UserError, match="'vq' is none of half, data"):
    load(f"configs/best_{name}.py:vq")
