"""A tiny run: a VAE of stride 1, 16-pixel images, 64 codes. Its update compiles in seconds."""

import numpy as np
from flax import nnx
from PIL import Image

from coda_jax import config as c
from coda_jax import weights
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.vae import AutoencoderKL, VAEConfig
from tests import tiny

VAE = VAEConfig(
  ch=16, norm_groups=8, ch_mult=(1,), encoder_blocks=1, decoder_blocks=1, encoder_attn=(), scale=1.0
)
LORA = LoRAConfig(rank=4)
QUANTIZER = QuantizerConfig(codebook_size=64, patch_sizes=(4, 16), chunk_size=64)


def make_inputs(folder) -> None:
  """Saves a VAE to `folder`/vae and noisy gradients to `folder`/images."""
  make = lambda: AutoencoderKL(VAE, rngs=nnx.Rngs(0))
  weights.save_vae(weights.build(make, tiny.random_params(make), "test"), folder / "vae")
  rng = np.random.default_rng(0)
  for split, count in (("train", 24), ("val", 6)):
    path = folder / "images" / split / "one"
    path.mkdir(parents=True)
    for i in range(count):
      ramp = np.linspace(0, 200, 24)[:, None, None] * rng.uniform(0, 1, (1, 1, 3))
      noise = rng.uniform(0, 50, (24, 24, 3))
      Image.fromarray((ramp + noise).astype(np.uint8)).save(path / f"{i}.png")


def config(folder, **changes) -> c.TrainConfig:
  """Its settings; `changes` are by dotted key with `__` for dots."""
  settings = c.TrainConfig(
    tokenizer=c.TokenizerSettings(
      vae=str(folder / "vae"), quantizer=QUANTIZER, lora=LORA, image_size=16
    ),
    data=c.DataSettings(
      train=f"folder:{folder}/images@train", eval=f"folder:{folder}/images@val", batch_size=8
    ),
    steps=6,
    losses=c.LossSettings(perceptual=0.0),
    ema=c.EMASettings(start_epoch=1),
    eval=c.EvalSettings(batch_size=8, lpips=False),
    checkpoint=c.CheckpointSettings(every=2),
    logging=c.LoggingSettings(every=1, tensorboard=False),
  )
  return c.changed(settings, **changes)
