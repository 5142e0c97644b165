"""Small models that the tests share. Built once per process: initialisation compiles per shape."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from coda_jax import weights
from coda_jax.models.clip_text import CLIPText, CLIPTextConfig
from coda_jax.models.lora import LoRAConfig
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.models.vae import VAEConfig

VAE = VAEConfig(
  ch=32, ch_mult=(1, 1), encoder_blocks=1, decoder_blocks=1, encoder_attn=(1,), scale=1.0
)
LORA = LoRAConfig(rank=4, name_parts=("conv1", "conv2", "upsample", "downsample"))
QUANTIZER = QuantizerConfig(codebook_size=64, patch_sizes=(1, 2, 3, 8), chunk_size=32)
TOKENIZER = TokenizerConfig(VAE, QUANTIZER, LORA, image_size=16)
TEXT = CLIPTextConfig(context=8, width=16, layers=1, heads=2, hidden=16)


def random_params(make, seed: int = 0) -> dict[str, np.ndarray]:
  """Random arrays for every parameter of the module that `make` describes."""
  rng = np.random.default_rng(seed)
  out = {}
  for name, shape in weights.expected_shapes(make).items():
    x = rng.standard_normal(shape, np.float32)
    fan_in = max(1, x.size // shape[-1]) if len(shape) > 1 else 100
    x = x if name == "quantizer.codebook" else x / np.float32(fan_in**0.5)
    out[name] = 1 + x if name.endswith(".scale") else x
  return out


@functools.cache
def tokenizer_params(config: TokenizerConfig = TOKENIZER, seed: int = 0):
  return random_params(lambda: Tokenizer(config, rngs=nnx.Rngs(0)), seed)


@functools.cache
def _structure(config: TokenizerConfig, dtype):
  return nnx.split(nnx.eval_shape(lambda: Tokenizer(config, dtype=dtype, rngs=nnx.Rngs(0))))


def tokenizer(config: TokenizerConfig = TOKENIZER, seed: int = 0, dtype=jnp.float32) -> Tokenizer:
  """A tokenizer with random weights, adapters included."""
  module = nnx.merge(*_structure(config, dtype))
  weights.set_params(module, tokenizer_params(config, seed), "test")
  return module


def images(*shape: int, seed: int = 1) -> jax.Array:
  """Random images [*shape, 3] in [-1, 1]."""
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.uniform(-1, 1, (*shape, 3)), jnp.float32)


# Compiled once per process and shape, for all tests; eager calls would compile every operation.
encode = nnx.jit(lambda vae, x: vae.encode(x))
decode = nnx.jit(lambda vae, z: vae.decode(z))
tokens = nnx.jit(lambda tok, x: tok.encode(x))
pixels = nnx.jit(lambda tok, ids, size: tok.decode(ids, size), static_argnums=2)
quantize = nnx.jit(lambda quantizer, x: quantizer(x))


def save_text_encoder(path, seed: int = 0):
  """Saves a text encoder with random weights: 8 vectors of 16 numbers; returns `path`."""
  params = random_params(lambda: CLIPText(TEXT, rngs=nnx.Rngs(0)), seed)
  params["token_embedding"] *= 100  # or texts would hardly differ
  weights.write_directory(path, "clip-text", {"clip_text": dataclasses.asdict(TEXT)}, params)
  return path
