"""Published PyTorch checkpoints to directories of coda_jax, and back; torch is not needed."""

from .api import convert, quantizer_to_flat, resize, to_flat, to_torch, vae_to_flat
from .reading import LAYOUTS

__all__ = [
  "LAYOUTS",
  "convert",
  "quantizer_to_flat",
  "resize",
  "to_flat",
  "to_torch",
  "vae_to_flat",
]
