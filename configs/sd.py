"""CODA's recipe for FLUX on Stable Diffusion's VAE, of versions 1, 2 and XL: 4 channels, 8x.

`configs/sd.py:sd3` is for Stable Diffusion 3's VAE, of 16 channels. Other arguments are those of
`configs/flux.py`: `configs/sd.py:512`, `:sd3,codebook_size=16384`.
"""

from coda_jax import config as c
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import FLUX_PATCH_SIZES, QuantizerConfig


def get_config(arg: str = "full"):
  words = arg.split(",")
  vae, channels = "checkpoints/sd_vae", 4
  if "sd3" in words:
    words.remove("sd3")
    vae, channels = "checkpoints/sd3_vae", 16
  quantizer = QuantizerConfig(
    codebook_size=65536, patch_sizes=FLUX_PATCH_SIZES, code_dim=channels, beta=0.05
  )
  config = c.TrainConfig(
    tokenizer=c.TokenizerSettings(
      vae=vae,
      lora=LoRAConfig(rank=32, name_parts=("conv1", "conv2")),
      quantizer=quantizer,
      image_size=256,
    ),
    data=c.DataSettings(
      train="tfds:imagenet2012@train",
      eval="tfds:imagenet2012@validation",
      batch_size=288,
      accumulation=3,
      workers=16,
    ),
    seed=42,
    epochs=10,
    adversarial=c.AdversarialSettings(
      discriminator="dino",
      dino_weights="checkpoints/dino",
      adaptive_layer="decoder.up.0.block.2.conv2",
    ),
    eval=c.EvalSettings(every=4448, images=5000, batch_size=96),  # 4448 updates are an epoch
  )
  return c.config_dict(c.variant(config, ",".join(words)))
