import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays
from tests import tiny


def test_flat_names_and_back():
  tokenizer = tiny.tokenizer()
  flat = arrays.of(tokenizer)
  assert list(flat) == sorted(flat)
  assert flat["vae.encoder.down.0.block.0.conv1.lora_up"].shape == (1, 1, 4, 32)
  graphdef, split = arrays.split(tokenizer)
  again = arrays.merge(graphdef, split)
  assert type(again.vae.encoder.down[0].block[0].conv1.lora_up) is nnx.LoRAParam
  assert all(np.array_equal(x, flat[name]) for name, x in arrays.of(again).items())


def test_later_arrays_win():
  graphdef, flat = arrays.split(nnx.LayerNorm(2, rngs=nnx.Rngs(0)))
  module = arrays.merge(graphdef, flat, {"bias": jnp.array([1.0, 2.0])})
  np.testing.assert_array_equal(module.bias[...], [1, 2])


def test_missing_arrays_are_an_error():
  graphdef, flat = arrays.split(nnx.LayerNorm(2, rngs=nnx.Rngs(0)))
  del flat["bias"]
  with pytest.raises(ValueError):
    arrays.merge(graphdef, flat)


def test_selection_by_path_and_type():
  tokenizer = tiny.tokenizer()
  adapters = arrays.of(tokenizer, arrays.matching((("LoRAParam", "decoder"),)))
  assert adapters and all("decoder" in n and ".lora_" in n for n in adapters)
  assert set(adapters) < set(arrays.of(tokenizer, arrays.matching((("Param", ""),))))
  assert not arrays.of(tokenizer, arrays.matching((("LoRAParam", "nothing"),)))
  both = arrays.matching((("LoRAParam", "decoder"), ("Param", "^quantizer")))
  _, chosen, rest = arrays.split(tokenizer, both, ...)
  assert set(chosen) > set(adapters) and not set(chosen) & set(rest)
