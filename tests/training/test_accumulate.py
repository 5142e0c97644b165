import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.training.accumulate import over_micro_batches


@pytest.mark.parametrize("count", [1, 3])
def test_carry_means_and_sums(count):
  """The carry goes from one micro-batch to the next; number and data of each are its own."""
  batches = {"x": jnp.arange(2.0 * count).reshape(count, 2)}

  def micro_batch(carry, i, batch):
    return carry * 2 + i, {"mean": batch["x"].mean()}, batch["x"].sum() + carry

  run = jax.jit(lambda carry, batches: over_micro_batches(micro_batch, carry, batches))
  carry, means, total = run(jnp.int32(1), batches)
  carries = [1]
  for i in range(count):
    carries.append(carries[-1] * 2 + i)
  assert carry == carries[-1]
  np.testing.assert_allclose(means["mean"], batches["x"].mean())
  np.testing.assert_allclose(total, batches["x"].sum() + sum(carries[:-1]))
