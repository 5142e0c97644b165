"""The table of measures, on features whose distances are known."""

import numpy as np
import pytest

from coda_jax.evaluation import frechet, measures
from coda_jax.evaluation.features import Networks
from coda_jax.evaluation.frechet import FeatureStatistics, Moments
from coda_jax.evaluation.kernel import kernel_distance
from coda_jax.evaluation.measures import FeatureSet, measure
from coda_jax.evaluation.neighbours import precision_recall
from coda_jax.evaluation.rows import Rows


class Scores(Networks):
  """Logits are the features."""

  def logits(self, pool3):
    return pool3


NETWORKS = Scores(None, None)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
  """Of 4 and 3 features, so that few images suffice."""
  monkeypatch.setattr(measures, "POOL3", 4)
  monkeypatch.setattr(measures, "SPATIAL", 3)
  monkeypatch.setattr(frechet, "VGG_FD_IMAGES", 12)


def features(n, seed, shift=0.0):
  rng = np.random.default_rng(seed)
  widths = {"pool3": 4, "spatial": 3, "vgg": 2}
  return {k: rng.normal(shift, 1, (n, d)).astype(np.float32) for k, d in widths.items()}


def rows(x):
  return {k: Rows([v[: len(v) // 2], v[len(v) // 2 :]]) for k, v in x.items()}


def test_every_measure_of_two_sets():
  a, b = features(20, 0), features(30, 1, 0.5)
  values, left_out = measure(FeatureSet(rows(a)), FeatureSet(rows(b)), NETWORKS)
  of = lambda name: [FeatureStatistics.of(x[name]) for x in (a, b)]
  assert left_out == {} and set(measures.LABELS) <= set(values)
  assert values["fid"] == pytest.approx(frechet.frechet_distance(*of("pool3")))
  assert values["sfid"] == pytest.approx(frechet.frechet_distance(*of("spatial")))
  assert values["vgg_fd"] == pytest.approx(frechet.frechet_distance(*of("vgg")))
  assert values["vgg_kd"] == pytest.approx(kernel_distance(a["vgg"], b["vgg"]), rel=1e-4)
  assert (values["precision"], values["recall"]) == precision_recall(b["pool3"], a["pool3"])
  assert values["kid_subset_size"] == 20 and values["inception_score"] > 1


def test_too_few_images_leave_out_what_needs_more():
  a, b = features(4, 0), features(30, 1)
  values, left_out = measure(FeatureSet(rows(a)), FeatureSet(rows(b)), NETWORKS)
  assert set(left_out) == {"fid", "vgg_fd"}
  assert left_out["fid"].startswith("FID needs at least 5 images on each side")
  assert {"sfid", "kid", "vgg_kd", "precision"} <= set(values)


def test_moments_of_a_file():
  a, b = features(20, 0), features(30, 1)
  real = FeatureStatistics.of(b["pool3"])
  file = FeatureSet({}, {"pool3": Moments(real.mean, real.covariance)}, count=30)
  values, left_out = measure(FeatureSet(rows(a)), file, NETWORKS)
  ours = FeatureStatistics.of(a["pool3"])
  assert values["fid"] == pytest.approx(frechet.frechet_distance(ours, real))
  assert set(values) == {"fid", "inception_score", "inception_score_std"}
  assert set(left_out) == {"sfid", "precision", "kid"}
  few = FeatureSet({}, {"pool3": Moments(real.mean, real.covariance)}, count=4)
  assert "fid" in measure(FeatureSet(rows(a)), few, NETWORKS)[1]
