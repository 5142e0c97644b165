"""What a MaskGIT is told: classes and texts by one interface."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays
from coda_jax.errors import UserError
from coda_jax.models.conditions import ClassCondition, Empty, TextCondition, TextShape
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig

TEXT = TextShape(tokens=5, width=6)
CONFIG = MaskGITConfig(
  width=16, depth=2, heads=2, num_classes=0, patch_sizes=(1, 2), codebook_size=32, text=TEXT
)


def embeddings(batch, seed=0):
  return np.random.default_rng(seed).normal(size=(batch, 5, 6)).astype(np.float16)


def test_classes():
  condition = ClassCondition(4, 8, nnx.Rngs(0))
  x, mask = jnp.array([0, 2, -1]), jnp.array([False, True, False])
  np.testing.assert_array_equal(condition.null(x), [3, 3, 3])
  np.testing.assert_array_equal(condition.drop(x, mask), [0, 3, 3])
  assert condition(condition.drop(x, mask)).shape == (3, 1, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_texts(dtype):
  condition = TextCondition(TEXT, 8, jnp.dtype(dtype), nnx.Rngs(0))
  empty = embeddings(1, seed=1)[0]
  condition.empty[...] = jnp.asarray(empty, jnp.float32)
  x, mask = jnp.asarray(embeddings(3)), jnp.array([False, True, False])
  np.testing.assert_array_equal(condition.null(x), [empty] * 3)
  dropped = condition.drop(x, mask)
  np.testing.assert_array_equal(dropped, [x[0], empty, x[2]])
  found = condition(dropped)
  assert found.shape == (3, 5, 8) and found.dtype == dtype
  expected = np.asarray(dropped, np.float32) @ condition.linear.kernel[...]
  np.testing.assert_allclose(found, expected, atol=1e-3 if dtype == "float32" else 0.02)


@pytest.mark.slow
def test_a_model_of_texts():
  model = nnx.jit(lambda: MaskGIT(CONFIG, rngs=nnx.Rngs(0)))()
  run = nnx.jit(lambda model, ids, x: model(ids, x))
  ids, x = jnp.full((2, 5), CONFIG.mask_id), jnp.asarray(embeddings(2))
  hidden = run(model, ids, x)
  assert hidden.shape == (2, 5, 16), "of the image's tokens alone"
  assert np.abs(hidden[0] - hidden[1]).max() > 1e-4
  swapped = run(model, ids, x.at[0, 3].set(x[1, 3]))  # every one of its vectors counts
  assert np.abs(swapped[0] - hidden[0]).max() > 1e-5
  _, trained, fixed = arrays.split(model, nnx.Param, ...)
  assert "condition.linear.kernel" in trained
  assert set(fixed) == {"condition.empty", "embedding.codes"}
  assert isinstance(model.condition.empty, Empty)


def test_a_model_has_classes_or_texts():
  with pytest.raises(UserError, match="3 classes and texts; a model has one of the two"):
    dataclasses.replace(CONFIG, num_classes=3)
  with pytest.raises(UserError, match="0 vectors of 6"):
    TextShape(0, 6)
  assert jax.tree.leaves(dataclasses.asdict(CONFIG)["text"]) == [5, 6]
