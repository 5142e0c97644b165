"""CODA on FLUX's VAE: the paper's settings (V = 65536, 2240 tokens an image, ImageNet 256).

`configs/flux.py:vq`, `:rq`, `:attention`, `:full` are the rows of the paper's Table 1;
`configs/flux.py:full,codebook_size=16384,norm=layer` changes the quantizer, `configs/flux.py:512`
is for images of 512 pixels. `configs/flux.py:flux2` is the same recipe on FLUX.2's VAE.
"""

from coda_jax import config as c
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import FLUX_PATCH_SIZES, QuantizerConfig


def get_config(arg: str = "full"):
  words = arg.split(",")
  vae, channels = "checkpoints/flux_vae", 16
  if "flux2" in words:
    words.remove("flux2")
    vae, channels = "checkpoints/flux2_vae", 32
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
