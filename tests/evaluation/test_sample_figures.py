import numpy as np
from PIL import Image

from coda_jax.evaluation import figures, sample_figures


def test_the_grid_shows_the_first_of_the_first_classes():
  assert sample_figures.grid_indices(6, 2) == [0, 1, 2, 3, 4, 5]
  found = sample_figures.grid_indices(200, 10)
  assert found[:9] == [0, 1, 2, 3, 4, 5, 6, 7, 10] and found[-1] == 117  # 8 of 12 classes
  assert sample_figures.grid_indices(20, 1) == list(range(12))


def test_grid_rows(monkeypatch):
  seen = []
  page = Image.new("RGB", (1, 1))
  monkeypatch.setattr(figures, "image_grid", lambda *args: seen.append(args) or page)
  image = np.zeros((4, 4, 3), np.uint8)

  def captions(per_class, count):
    labels = [str(i // per_class) for i in range(count)]
    shown = {i: image for i in sample_figures.grid_indices(count, per_class)}
    sample_figures.sample_grid(shown, labels, per_class)
    return seen[-1][2]

  assert captions(2, 4) == [["0", "0"], ["1", "1"]]
  assert captions(1, 3) == [["0", "1", "2"]]
  # One image of each of ten classes: two rows, the second filled with white.
  assert captions(1, 10) == [[str(i) for i in range(8)], ["8", "9", *[""] * 6]]
  assert (seen[-1][0][1][2] == 255).all()
