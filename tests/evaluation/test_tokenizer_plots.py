import numpy as np
import pytest

from coda_jax.evaluation import tokenizer_plots


def test_uniform_utilization_by_simulation():
  draws = np.random.default_rng(0).integers(0, 50, (2000, 70))
  seen = np.mean([len(np.unique(d)) for d in draws]) / 50
  none, reached = tokenizer_plots.uniform_utilization(np.array([0, 70]), 50)
  assert none == 0
  assert reached == pytest.approx(seen, abs=0.005)
