"""The demo: a small VAE in MAR's layout, adapted on the embedded photos in a few CPU minutes.

`configs/demo.py:attention` is the same recipe and budget without LoRA; `:adversarial` adds a small
PatchGAN (DINO's weights are not embedded) and takes 1500 updates; `:thumbnails` is for 32x32, the
tokenizer of `configs/maskgit.py:demo`.
"""

import dataclasses

from coda_jax import config as c
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import MAR_PATCH_SIZES, QuantizerConfig


def get_config(arg: str = "full"):
  config = c.TrainConfig(
    tokenizer=c.TokenizerSettings(
      vae="demo/vae",
      lora=LoRAConfig(rank=16, name_parts=("conv1", "conv2", "upsample", "downsample")),
      quantizer=QuantizerConfig(codebook_size=1024, patch_sizes=MAR_PATCH_SIZES),
      image_size=64,
    ),
    data=c.DataSettings(
      train="embedded@train", eval="embedded@val", batch_size=4, resize_ratio=1.5, flip=True
    ),
    steps=300,
    # A few hundred updates: the codes must move fast, the adapters must not outrun them, and pixels
    # weigh more than in the paper, where the quantization loss has hundreds of thousands.
    losses=c.LossSettings(l1=2.0, mse=8.0, perceptual=1.5, quantization=0.3, entropy=0.06),
    optimizer=c.OptimizerSettings(learning_rate=5e-3, warmup_steps=10, rates=((r"^vae\.", 0.3),)),
    ema=c.EMASettings(decay=0.98, start_epoch=0),
    eval=c.EvalSettings(every=100, batch_size=12),
    checkpoint=c.CheckpointSettings(every=100),
    logging=c.LoggingSettings(every=10),
  )
  words = arg.split(",")
  for changes in (adversarial, thumbnails):
    if changes.__name__ in words:
      words.remove(changes.__name__)
      config = dataclasses.replace(config, **changes(config))
  return c.config_dict(c.variant(config, ",".join(words)))


def adversarial(config: c.TrainConfig) -> dict:
  """Changes for a run with a discriminator, which needs more updates than the demo has."""
  return {
    "steps": 1500,
    "adversarial": c.AdversarialSettings(
      discriminator="patch",
      patch_width=32,
      patch_layers=2,
      weight=0.5,
      optimizer=dataclasses.replace(config.adversarial.optimizer, learning_rate=1e-3),
    ),
    "eval": dataclasses.replace(config.eval, every=300),
    "checkpoint": dataclasses.replace(config.checkpoint, every=300),
  }


def thumbnails(config: c.TrainConfig) -> dict:
  """Changes for 32x32: 130 tokens an image, few enough for a generator that a CPU trains."""
  quantizer = dataclasses.replace(
    config.tokenizer.quantizer, codebook_size=512, patch_sizes=(1, 2, 3, 4, 6, 8)
  )
  return {
    "tokenizer": dataclasses.replace(config.tokenizer, quantizer=quantizer, image_size=32),
    "data": dataclasses.replace(config.data, batch_size=16),
    "steps": 1500,
    "eval": dataclasses.replace(config.eval, every=500),
    "checkpoint": dataclasses.replace(config.checkpoint, every=250),
  }
