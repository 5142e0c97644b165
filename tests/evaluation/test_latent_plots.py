import numpy as np
import pytest

from coda_jax.evaluation import latent_plots


def test_principal_axes_of_a_flat_cloud():
  rng = np.random.default_rng(0)
  plane = np.linalg.qr(rng.normal(size=(6, 2)))[0]
  x = (rng.normal(size=(500, 2)) * [3, 1]) @ plane.T + 5
  mean, axes, inside = latent_plots.principal_axes(x.astype(np.float32))
  np.testing.assert_allclose(mean, x.mean(0), atol=1e-4)
  assert inside == pytest.approx(1, abs=1e-5)
  np.testing.assert_allclose(axes @ axes.T, plane @ plane.T, atol=1e-3)
  assert abs(axes[:, 0] @ plane[:, 0]) > 0.99


def test_bright_is_likely_of_weights_and_distances():
  weights = np.array([[0.9, 0.1], [0.8, 0.0]])
  found = {"attention": ("weight", weights), "euclidean": ("distance", 1 - weights)}
  images = [x.images[0] for x in latent_plots.confidence_plot(found).axes if x.images]
  for image in images:
    likely, other = image.to_rgba(image.get_array())[0, :, :3].sum(1)
    assert likely > other


def test_movement_shows_chosen_steps_and_paths():
  rng = np.random.default_rng(0)
  inputs = rng.normal(size=(100, 4)).astype(np.float32)
  codes = {1: inputs[:10], 1000: inputs[:10] * 2}
  first, last, paths = latent_plots.movement_plot(inputs, codes).axes
  titles = [x.get_title("left") for x in (first, last, paths)]
  assert titles == ["1 update", "1,000 updates", "paths of 10 codes"]
  before, after = (np.asarray(x.collections[1].get_offsets()) for x in (first, last))
  path = paths.collections[1].get_segments()[3]
  np.testing.assert_allclose(path, [before[3], after[3]], rtol=1e-5)
