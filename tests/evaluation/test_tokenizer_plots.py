import numpy as np
import pytest

from coda_jax.evaluation import tokenizer_plots


def test_uniform_utilization_by_simulation():
  draws = np.random.default_rng(0).integers(0, 50, (2000, 70))
  seen = np.mean([len(np.unique(d)) for d in draws]) / 50
  none, reached = tokenizer_plots.uniform_utilization(np.array([0, 70]), 50)
  assert none == 0
  assert reached == pytest.approx(seen, abs=0.005)


def test_principal_axes_of_a_flat_cloud():
  rng = np.random.default_rng(0)
  plane = np.linalg.qr(rng.normal(size=(6, 2)))[0]
  x = (rng.normal(size=(500, 2)) * [3, 1]) @ plane.T + 5
  mean, axes, inside = tokenizer_plots.principal_axes(x.astype(np.float32))
  np.testing.assert_allclose(mean, x.mean(0), atol=1e-4)
  assert inside == pytest.approx(1, abs=1e-5)
  np.testing.assert_allclose(axes @ axes.T, plane @ plane.T, atol=1e-3)
  assert abs(axes[:, 0] @ plane[:, 0]) > 0.99
