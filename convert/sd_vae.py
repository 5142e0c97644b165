"""Stable Diffusion's VAE, of versions 1, 2 and XL: diffusers' folder, and LDM's keys.

LDM's keys are those of `first_stage_model.` in whole checkpoints and of single files. Version 3 has
the layouts of FLUX.1's VAE (`flux_vae`).
"""

import dataclasses

from . import flux_vae, mar_vae
from .rules import POINTWISE, Rule

# diffusers before 0.12, of which Stable Diffusion 1.5 is published, named attention so.
_OLD_ATTENTION = (("query", "q"), ("key", "k"), ("value", "v"), ("proj_attn", "proj_out"))

DIFFUSERS = dataclasses.replace(
  flux_vae.DIFFUSERS,
  title="Stable Diffusion's VAE as diffusers keeps it",
  rules=(
    *flux_vae.DIFFUSERS.rules,
    *(Rule(f"{theirs}.weight", f"{ours}.kernel", POINTWISE) for theirs, ours in _OLD_ATTENTION),
    *(Rule(theirs, ours) for theirs, ours in _OLD_ATTENTION),
  ),
  order=(*flux_vae.DIFFUSERS.order, "quant_conv", "post_quant_conv"),
)

LDM = dataclasses.replace(mar_vae.LAYOUT, title="Stable Diffusion's VAE with LDM's keys")
