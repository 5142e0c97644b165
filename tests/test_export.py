"""Programs for TPUs and GPUs are made here, where neither is: nothing asks the tracing machine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import arrays, sharding
from coda_jax import config as c
from coda_jax.training.tokenizer_trainer import TokenizerTrainer
from tests import tiny
from tests.exporting import PLATFORMS, check
from tests.training import runs


def test_encode_and_decode():
  graphdef, flat = arrays.split(tiny.tokenizer())
  images = tiny.images(2, 16, 16)
  ids = tiny.tokens(tiny.tokenizer(), images)
  check(lambda flat, x: arrays.merge(graphdef, flat).encode(x), flat, images, tolerance=0)
  check(lambda flat, ids: arrays.merge(graphdef, flat).decode(ids), flat, ids)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
  folder = tmp_path_factory.mktemp("export")
  runs.make_inputs(folder)
  patchgan = c.AdversarialSettings(discriminator="patch", patch_width=4, patch_layers=1)
  config = runs.config(folder, adversarial=patchgan)
  return TokenizerTrainer(config, sharding.make_mesh(config.mesh, jax.devices()[:1]))


@pytest.mark.slow
def test_tokenizer_update(trainer):
  """The whole update. TPUs look values up by products with one-hot rows, others by a gather."""
  images = np.random.default_rng(0).integers(0, 256, (1, 8, 16, 16, 3), np.uint8)
  state = trainer.initial_state()
  args = state, trainer._frozen, trainer._key, jnp.asarray(images)
  texts = check(trainer._keyed_update, *args, tolerance=1e-4)
  assert len(set(texts.values())) == len(PLATFORMS)
