import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.evaluation.neighbours import precision_recall, radii
from coda_jax.evaluation.rows import Rows


def naive(real, samples, k=3):
  """ADM's definition, all distances at once: the radius is index k of a row's sorted distances."""

  def distances(a, b):
    return np.square(a[:, None].astype(float) - b[None]).sum(-1)

  inside = lambda a, b: np.any(distances(a, b) <= np.sort(distances(b, b), axis=1)[:, k], axis=1)
  return inside(samples, real).mean(), inside(real, samples).mean()


@pytest.mark.parametrize("block", [7, 16, 1000])
def test_any_block_gives_adms_definition(block):
  rng = np.random.default_rng(0)
  real = rng.normal(size=(33, 5)).astype(np.float32)
  samples = (0.6 * rng.normal(size=(24, 5)) + 0.4).astype(np.float32)
  expected = naive(real, samples)
  assert 0.2 < expected[1] < expected[0] < 1
  parts = Rows([samples[:10], samples[10:]])
  np.testing.assert_allclose(precision_recall(real, parts, block=block), expected, atol=1e-9)
  np.testing.assert_allclose(
    radii(real, block=block),
    np.sort(np.square(real[:, None] - real[None]).sum(-1), axis=1)[:, 3],
    rtol=1e-4,
  )


def test_known_values():
  """On a line, with k = 1: a far cluster of samples is in no ball of the real images."""
  real = np.array([[0.0], [1.0], [2.0]], np.float32)
  samples = np.array([[0.5], [1.5], [50.0], [50.1]], np.float32)
  # Balls of real images reach 1; of the samples 1 and 0.1.
  assert precision_recall(real, samples, k=1) == (0.5, 1.0)
  assert precision_recall(real, real, k=1) == (1.0, 1.0)


def test_too_few():
  with pytest.raises(UserError, match="more than 3 images on each side, got 3"):
    precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))
  with pytest.raises(UserError, match="features of 2 and 3"):
    precision_recall(np.zeros((5, 2)), np.zeros((9, 3)))
