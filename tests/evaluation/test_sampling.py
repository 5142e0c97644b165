import numpy as np

from coda_jax.evaluation.sampling import sample_batches
from coda_jax.generation.sampler import SamplerSettings

SETTINGS = SamplerSettings(steps=2)


class Maker:
  """Grey images whose value tells class and global index; remembers its calls."""

  def __init__(self):
    self.calls = []

  def __call__(self, classes, first, settings):
    self.calls.append((classes, first, settings.steps))
    values = [10 * c + first + i for i, c in enumerate(classes)]
    return np.stack([np.full((2, 2, 3), v / 127.5 - 1, np.float32) for v in values])


def test_the_last_batch_is_filled_and_cut():
  make = Maker()
  found = list(sample_batches(make, [0, 1, 2], SETTINGS, 2))
  assert make.calls == [([0, 1], 0, 2), ([2, 2], 2, 2)]
  assert [first for first, *_ in found] == [0, 2]
  images = np.concatenate([images for _, images, _ in found])
  assert images.dtype == np.uint8
  np.testing.assert_array_equal(images[:, 0, 0, 0], [0, 11, 22])
  assert all(seconds > 0 for *_, seconds in found)


def test_a_batch_is_no_larger_than_what_is_wanted():
  make = Maker()
  ((_, images, _),) = sample_batches(make, [1], SETTINGS, 8)
  assert make.calls == [([1], 0, 2)] and len(images) == 1
