import numpy as np

from coda_jax.evaluation import figures
from tests.evaluation.test_report import HISTORY


def test_training_curves():
  curves = figures.training_curves({"a": HISTORY, "b": HISTORY[:2]})
  assert list(curves) == [
    "eval: psnr",
    "eval: error by level",
    "train: loss",
    "train: usage by level",
  ]
  assert curves["eval: psnr"] == {"a": ([10, 20], [20.0, 21.0]), "b": ([10], [20.0])}
  assert curves["train: loss"]["a"] == ([10, 30], [2.0, 1.0])  # not finite at 20
  assert curves["train: usage by level"] == {0: ([10, 20], [0.1, 0.3]), 1: ([10, 20], [0.2, 0.4])}
  assert curves["eval: error by level"] == {1: ([10, 20], [0.5, 0.4])}


def test_grid_keeps_pixels_and_fits_its_text():
  image = np.random.default_rng(0).integers(0, 256, (20, 40, 3), np.uint8)
  large = np.zeros((600, 1200, 3), np.uint8)
  np.testing.assert_array_equal(figures.thumbnail(image)[::4, ::4], image)  # 4 x 40 is 160
  assert figures.thumbnail(large).shape == (256, 512, 3)
  page = np.asarray(
    figures.image_grid([[image, image], [large, large]], ["a", "b " * 99], [["x", "y"], ["", "z"]])
  )
  assert page.shape[1] == 2 * 512 + 3 * 8  # narrower than a page: nothing is zoomed
  side_by_side = figures.image_grid([[image]] * 3, ["a"], blocks=2)
  assert side_by_side.width == 2 * 160 + 5 * 8 and side_by_side.height < 3 * 80 + 8 * 4
  enlarged = figures.thumbnail(image)
  rows = np.flatnonzero((page[:, 8:168] == enlarged[0]).all((1, 2)))
  assert rows.size and (page[rows[0] : rows[0] + 80, 8:168] == enlarged).all()
