import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from coda_jax import arrays, weights
from coda_jax.evaluation.conventions import convention
from coda_jax.models import inception
from tests.conftest import assert_close


@pytest.mark.parity("inception")
def test_readouts_are_the_published_networks(golden):
  """From the file to the features; the two published files have one list of keys."""
  state = golden.state_dict(golden["keys"])
  _, flat = convert.to_flat("inception", state)
  graphdef, params = arrays.split(weights.build(inception.Inception, flat, golden.name))

  @jax.jit
  def run(params, images):
    net = arrays.merge(graphdef, params)
    pool3, spatial = net(convention("coda").network_input(images))
    return pool3, spatial.reshape(-1, 17, 17, 7), net.logits(pool3)

  images, out = np.moveaxis((golden.input() + 1) / 2, 1, -1), golden.outputs()
  pool3, spatial, logits = run(params, images)
  assert_close(pool3, out["pool3"], 1e-4, "pool3")
  assert_close(logits, pool3 @ state["fc.weight"].T, 1e-5, "logits without bias")

  # sFID's features are channels 0 to 6 of Mixed_6d.branch1x1.
  zeroed = {}
  for name in ("scale", "bias"):
    key = f"Mixed_6d.branch1x1.bn.{name}"
    zeroed[key] = params[key].at[jnp.array([3, *range(7, 192)])].set(0)
  others, changed, _ = run(params | zeroed, images)
  assert np.abs(others - pool3).max() > 1e-3
  assert np.abs(spatial[..., 3]).max() > 0 and not np.asarray(changed)[..., 3].any()
  np.testing.assert_array_equal(np.delete(spatial, 3, -1), np.delete(changed, 3, -1))


def test_pools_of_the_published_network():
  """Averages do not count padding; the last block's pool is a maximum that sees no padding."""
  x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 5, 4, 2)) - 9, jnp.float32)
  for name, reduce in (("average", np.mean), ("max", np.max)):
    ours = np.asarray(inception._POOLS[name](x))
    for i in range(5):
      for j in range(4):
        window = np.asarray(x)[0, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        np.testing.assert_allclose(ours[0, i, j], reduce(window, axis=(0, 1)), rtol=1e-5)
  last, first = inception._BLOCKS["Mixed_7c"], inception._BLOCKS["Mixed_7b"]
  assert (last[-1][0], first[-1][0]) == ("max", "average")
