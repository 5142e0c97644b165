"""CODA in JAX: continuous image VAEs adapted into discrete tokenizers (arXiv 2503.17760)."""

from coda_jax.generation.generator import load_generator
from coda_jax.weights import load_tokenizer, load_vae, save_tokenizer, save_vae

__version__ = "0.1.0"

__all__ = ["load_generator", "load_tokenizer", "load_vae", "save_tokenizer", "save_vae"]
