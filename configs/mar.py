"""CODA on MAR's KL-16 VAE: the paper's settings (V = 16384, 680 tokens an image, ImageNet 256).

`configs/mar.py:vq`, `:rq`, `:attention`, `:full` are the rows of the paper's Table 1;
`configs/mar.py:full,codebook_size=65536,norm=layer` changes the quantizer, `configs/mar.py:512` is
for images of 512 pixels.
"""

from coda_jax import config as c
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import MAR_PATCH_SIZES, QuantizerConfig


def get_config(arg: str = "full"):
  config = c.TrainConfig(
    tokenizer=c.TokenizerSettings(
      vae="checkpoints/mar_vae",
      lora=LoRAConfig(rank=32, name_parts=("conv1", "conv2", "upsample", "downsample")),
      quantizer=QuantizerConfig(codebook_size=16384, patch_sizes=MAR_PATCH_SIZES, beta=0.05),
      image_size=256,
    ),
    data=c.DataSettings(
      train="tfds:imagenet2012@train",
      eval="tfds:imagenet2012@validation",
      batch_size=512,
      accumulation=4,
      workers=16,
    ),
    seed=42,
    epochs=10,
    adversarial=c.AdversarialSettings(
      discriminator="dino",
      dino_weights="checkpoints/dino",
      adaptive_layer="decoder.up.4.upsample.conv",  # the official one; "last" is faster
    ),
    eval=c.EvalSettings(every=2502, images=5000, batch_size=128),  # 2502 updates are an epoch
  )
  return c.config_dict(c.variant(config, arg))
