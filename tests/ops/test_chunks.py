import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax.ops.chunks import Chunks


@pytest.mark.parametrize(
  ("n", "size", "count"), [(1, 4, 1), (12, 4, 3), (13, 4, 4), (7, 100, 1), (5, 0, 5)]
)
def test_rows_come_back_in_order(n, size, count):
  x = jnp.arange(2.0 * n).reshape(n, 2)
  chunks = Chunks(x, size)
  parts = chunks.split(x)
  assert len(parts) == count and parts.shape[1] <= max(size, 1)
  np.testing.assert_array_equal(chunks.join(parts), x)
  doubled, sums = chunks.map(lambda a, b: (2 * a, a.sum(1) + b), x, x[:, 0])
  np.testing.assert_array_equal(doubled, 2 * x)
  np.testing.assert_array_equal(sums, x.sum(1) + x[:, 0])
