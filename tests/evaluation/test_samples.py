"""Measures of samples on a stand-in for VGG: colours, whose distances are known."""

import numpy as np
import pytest

from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation import frechet, samples
from coda_jax.evaluation.kernel import kernel_distance
from tests import tiny
from tests.generation.test_generator import generator


@pytest.fixture(autouse=True)
def colours(monkeypatch):
  """Features are mean colours."""
  networks = {"vgg": (lambda path: None, lambda _: lambda x: np.asarray(x).mean((1, 2)))}
  monkeypatch.setattr(samples, "NETWORKS", networks)


def images(n, seed):
  return np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), np.uint8)


def test_measures_are_those_of_the_features():
  real, made = images(7, 0), images(5, 1) // 2
  evaluator = samples.SampleEvaluator(real, batch_size=4)
  found = evaluator(made)
  a, b = (normalize(x).mean((1, 2)) for x in (made, real))
  assert found == {"images": 5, "vgg_kd": pytest.approx(kernel_distance(a, b))}
  assert found["vgg_kd"] > evaluator(images(5, 2))["vgg_kd"]


def test_frechet_distance_with_enough_images(monkeypatch):
  rng = np.random.default_rng(0)
  evaluator = samples.SampleEvaluator(images(3, 0))
  evaluator.real = {"vgg": rng.normal(size=(frechet.VGG_FD_IMAGES, 3))}
  features = {"vgg": rng.normal(size=(frechet.VGG_FD_IMAGES, 3)) + [1, 0, 0]}
  assert evaluator.measure(features)["vgg_fd"] == pytest.approx(1, abs=0.2)
  few = {"vgg": features["vgg"][:-1]}
  assert "vgg_fd" not in evaluator.measure(few)


def test_one_real_image_is_too_few():
  with pytest.raises(UserError, match="2 real images"):
    samples.SampleEvaluator(images(1, 0))


@pytest.mark.slow
def test_yardsticks():
  crops = images(5, 3)
  g = generator()
  sets = samples.yardsticks(g, crops, batch_size=2)
  assert list(sets) == [
    "other real crops",
    "other real crops, reconstructed",
    "tokens from marginals",
    "random tokens",
  ]
  assert all(x.shape == crops.shape and x.dtype == np.uint8 for x in sets.values())
  np.testing.assert_array_equal(sets["other real crops"], crops)
  made = np.asarray(
    tiny.pixels(tiny.tokenizer(), tiny.tokens(tiny.tokenizer(), crops_of(crops)), None)
  )
  ours = sets["other real crops, reconstructed"][:2].astype(int)
  assert np.abs(ours - np.clip((made + 1) * 127.5, 0, 255)).max() <= 1.1
  again = samples.yardsticks(g, crops, batch_size=2)
  np.testing.assert_array_equal(sets["random tokens"], again["random tokens"])


def crops_of(crops):
  return normalize(crops[:2])


def test_table():
  text = samples.table({"a": {"images": 3, "vgg_kd": 0.5}, "bb": {"images": 2000, "vgg_fd": 1.25}})
  assert [line.split() for line in text.splitlines()] == [
    ["VGG-KD", "VGG-FD", "images"],
    ["a", "0.5000", "–", "3"],
    ["bb", "–", "1.2500", "2000"],
  ]
