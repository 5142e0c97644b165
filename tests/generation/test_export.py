"""The sampler's loop is exported here for machines that are not there."""

import jax
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays
from coda_jax.generation import sampler
from coda_jax.generation.sampler import SamplerSettings
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from tests.exporting import check

CONFIG = MaskGITConfig(
  width=16, depth=2, heads=2, num_classes=3, patch_sizes=(1, 2, 3), codebook_size=32
)


@pytest.mark.parametrize(
  "settings",
  [
    SamplerSettings(steps=3),
    pytest.param(
      SamplerSettings(steps=3, guidance=0, top_k=5, top_p=0.9, order="coarse_to_fine"),
      marks=pytest.mark.slow,
    ),
  ],
)
@pytest.mark.slow
def test_every_platform_has_a_program(settings, monkeypatch):
  codes = jax.random.normal(jax.random.key(5), (CONFIG.codebook_size, CONFIG.code_dim))
  model = nnx.jit(lambda: MaskGIT(CONFIG, codes=codes, rngs=nnx.Rngs(0)))()
  ids, condition = np.full((2, CONFIG.tokens), CONFIG.mask_id), np.array([0, 2])
  call = ids, condition, jax.random.key(1), settings
  expected = sampler.sample(model, *call).ids

  monkeypatch.setattr(sampler, "_compiled", lambda model: lambda *args: args)
  *args, form = sampler.bind(model)(*call)
  graphdef, flat = arrays.split(model)

  def loop(flat, *args):
    return sampler.loop(arrays.merge(graphdef, flat), *args, form).ids

  check(loop, flat, *args, tolerance=0)
  np.testing.assert_array_equal(jax.jit(loop)(flat, *args), expected)
