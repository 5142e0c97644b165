import numpy as np
import pytest

from coda_jax.evaluation import samples
from coda_jax.evaluation.sampling import joined, sample_batches, timed_measures
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


def test_features_are_joined_by_network():
  parts = [{"vgg": np.zeros((2, 3))}, {"vgg": np.ones((1, 3))}]
  np.testing.assert_array_equal(joined(parts)["vgg"][:, 0], [0, 0, 1])


def test_timed_measures_are_those_of_all_samples(monkeypatch):
  networks = {"vgg": (lambda path: None, lambda _: lambda x: np.asarray(x).mean((1, 2)))}
  monkeypatch.setattr(samples, "NETWORKS", networks)
  real = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
  evaluator, make = samples.SampleEvaluator(real), Maker()
  row = timed_measures(make, [0, 1, 2], SETTINGS, 2, evaluator)
  assert len(make.calls) == 3  # the first batch once more, before the time is taken
  images = np.concatenate([x for _, x, _ in sample_batches(Maker(), [0, 1, 2], SETTINGS, 2)])
  expected = evaluator(images)
  assert row.pop("seconds") > 0
  assert row == pytest.approx(expected)
