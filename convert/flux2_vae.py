"""FLUX.2's VAE: diffusers' folder, and the single file `ae.safetensors`.

Beside the autoencoder they hold mean and variance of the 128 channels that a patch of 2 x 2 latents
of 32 channels becomes, in the order (channel, row, column).
"""

import dataclasses

import numpy as np

from . import flux_vae, mar_vae
from .rules import Rule, Transform

_PATCH = 2


def _by_patch(x: np.ndarray) -> np.ndarray:
  return x.reshape(-1, _PATCH, _PATCH).transpose(1, 2, 0) if x.size % _PATCH**2 == 0 else x


_STATISTICS = Transform(_by_patch, lambda x: x.transpose(2, 0, 1).reshape(-1))
_RULES = (
  Rule("bn.running_mean", "latent_norm.mean", _STATISTICS),
  Rule("bn.running_var", "latent_norm.var", _STATISTICS),
)
_ORDER = ("quant_conv", "post_quant_conv", "bn", "running_mean", "running_var")
_CARRIED = (r"bn\.num_batches_tracked",)

DIFFUSERS = dataclasses.replace(
  flux_vae.DIFFUSERS,
  title="FLUX.2's VAE as diffusers keeps it",
  rules=(*_RULES, *flux_vae.DIFFUSERS.rules),
  order=(*flux_vae.DIFFUSERS.order, *_ORDER),
  carried=_CARRIED,
)

SINGLE_FILE = dataclasses.replace(
  flux_vae.SINGLE_FILE,
  title="FLUX.2's VAE as a single file",
  rules=(
    *_RULES,
    Rule("encoder.quant_conv", "quant_conv"),
    Rule("decoder.post_quant_conv", "post_quant_conv"),
    *mar_vae.RULES,
  ),
  order=(*mar_vae.ORDER, *_ORDER),
  carried=_CARRIED,
)
