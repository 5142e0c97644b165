"""CODA in JAX: continuous image VAEs adapted into discrete tokenizers (arXiv 2503.17760)."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from coda_jax.api import (
    as_images,
    load_generator,
    load_tokenizer,
    load_vae,
    push,
    save_tokenizer,
    save_vae,
    to_pil,
  )

__version__ = "0.1.0"

__all__ = [
  "as_images",
  "load_generator",
  "load_tokenizer",
  "load_vae",
  "push",
  "save_tokenizer",
  "save_vae",
  "to_pil",
]


def __getattr__(name: str):
  """JAX and Flax are imported when the first of these is used."""
  if name in __all__:
    return getattr(importlib.import_module("coda_jax.api"), name)
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted([*globals(), *__all__])
