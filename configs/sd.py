"""CODA's recipe for FLUX on Stable Diffusion's VAE, of versions 1, 2 and XL: 4 channels, 8x.

`configs/sd.py:sd3` is for Stable Diffusion 3's VAE, of 16 channels. Other arguments are those of
`configs/flux.py`: `configs/sd.py:512`, `:sd3,codebook_size=16384`.
"""

import pathlib

from coda_jax import cli


def get_config(arg: str = "full"):
  words = arg.split(",")
  vae, channels = "checkpoints/sd_vae", 4
  if "sd3" in words:
    words.remove("sd3")
    vae, channels = "checkpoints/sd3_vae", 16
  config = cli.load_config(f"{pathlib.Path(__file__).with_name('flux.py')}:{','.join(words)}")
  config.update({"tokenizer": {"vae": vae, "quantizer": {"code_dim": channels}}})
  return config
