"""The distances of a set of images from a real one: one table, for every command.

A measure is of features by name (`features.Networks.features`): `pool3` and `spatial` are
Inception's, `vgg` is LPIPS's VGG. What cannot be measured is left out with a line that says why.
"""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from coda_jax.errors import UserError
from coda_jax.evaluation import frechet
from coda_jax.evaluation.features import Networks
from coda_jax.evaluation.frechet import FeatureStatistics, Moments
from coda_jax.evaluation.inception_score import ClassSums
from coda_jax.evaluation.kernel import kernel_distance, kernel_inception_distance
from coda_jax.evaluation.neighbours import precision_recall
from coda_jax.evaluation.rows import BLOCK, Rows
from coda_jax.models.inception import POOL3, SPATIAL


class FeatureSet:
  """Features of a set of images, and their moments.

  Args:
    rows: [N, D] by name.
    moments: those that a statistics file holds; others are taken of `rows`.
    count: images, None if a file does not say.
  """

  def __init__(
    self,
    rows: Mapping[str, Rows],
    moments: Mapping[str, Moments] | None = None,
    count: int | None = None,
  ):
    self.rows, self._given, self._taken = rows, dict(moments or {}), {}
    self.count = count

  def moments(self, name: str) -> Moments | FeatureStatistics | None:
    """Mean and covariance of the features `name`, or None; taken once."""
    if name in self._given:
      return self._given[name]
    if name in self.rows and name not in self._taken:
      self._taken[name] = FeatureStatistics.of(self.rows[name])
    return self._taken.get(name)

  def images(self, name: str) -> int | None:
    """How many images the moments of `name` are of."""
    if name in self._given:
      return self.count
    return len(self.rows[name]) if name in self.rows else None


Values = dict[str, float | int]


@dataclasses.dataclass(frozen=True)
class Measure:
  """A distance of two sets, or a score of one.

  Attributes:
    label: as people read it; the arrow says what is better.
    features: which ones it takes.
    of: (name, samples, real) -> values by name, `name` the first of them.
  """

  label: str
  features: str
  of: Callable[[str, FeatureSet, FeatureSet, Networks], Values]


def _frechet(name: str, samples: FeatureSet, real: FeatureSet, networks: Networks) -> Values:
  measure = MEASURES[name]
  key = measure.features
  ours, theirs = samples.moments(key), real.moments(key)
  assert ours is not None and theirs is not None
  if key == "vgg":
    return {name: frechet.vgg_frechet_distance(_counted(ours), _counted(theirs))}
  width = {"pool3": POOL3, "spatial": SPATIAL}[key]
  label = measure.label.split()[0]
  frechet.check_count(label, width, samples.images(key), real.images(key))
  return {name: frechet.frechet_distance(ours, theirs)}


def _counted(moments: Moments | FeatureStatistics) -> FeatureStatistics:
  assert isinstance(moments, FeatureStatistics), "files hold no moments of VGG"
  return moments


def _kid(name: str, samples: FeatureSet, real: FeatureSet, networks: Networks) -> Values:
  found = kernel_inception_distance(samples.rows["pool3"], real.rows["pool3"])
  return {
    name: found.mean,
    f"{name}_std": found.std,
    f"{name}_subsets": found.subsets,
    f"{name}_subset_size": found.subset_size,
  }


def _vgg_kd(name: str, samples: FeatureSet, real: FeatureSet, networks: Networks) -> Values:
  return {name: kernel_distance(samples.rows["vgg"], real.rows["vgg"])}


def _neighbours(name: str, samples: FeatureSet, real: FeatureSet, networks: Networks) -> Values:
  precision, recall = precision_recall(real.rows["pool3"], samples.rows["pool3"])
  return {"precision": precision, "recall": recall}


def _score(name: str, samples: FeatureSet, real: FeatureSet, networks: Networks) -> Values:
  sums, first = None, 0
  for pool3 in samples.rows["pool3"].blocks(BLOCK):
    part = ClassSums.of(networks.logits(pool3), first)
    sums, first = part if sums is None else sums.merge(part), first + len(pool3)
  if sums is None:
    raise UserError("an Inception score needs images")
  mean, std = sums.score()
  return {name: mean, f"{name}_std": std}


MEASURES = {
  "fid": Measure("FID ↓", "pool3", _frechet),
  "sfid": Measure("sFID ↓", "spatial", _frechet),
  "inception_score": Measure("Inception score ↑", "pool3", _score),
  "precision": Measure("Precision ↑", "pool3", _neighbours),
  "kid": Measure("KID ↓", "pool3", _kid),
  "vgg_fd": Measure("VGG-FD ↓", "vgg", _frechet),
  "vgg_kd": Measure("VGG-KD ↓", "vgg", _vgg_kd),
}
_OF_SAMPLES_ALONE = ("inception_score",)
_OF_MOMENTS = ("fid", "sfid", "vgg_fd")
LABELS = {name: m.label for name, m in MEASURES.items()} | {"recall": "Recall ↑"}


def measure(
  samples: FeatureSet, real: FeatureSet, networks: Networks
) -> tuple[Values, dict[str, str]]:
  """(values by name, why others are left out, by name).

  Measures of networks that are missing are in neither: `Networks.notes` says so.
  """
  values: Values = {}
  left_out: dict[str, str] = {}
  for name, m in MEASURES.items():
    if m.features not in samples.rows:
      continue
    if name not in _OF_SAMPLES_ALONE:
      there = real.moments(m.features) if name in _OF_MOMENTS else real.rows.get(m.features)
      if there is None:
        if name not in ("vgg_fd", "vgg_kd"):
          left_out[name] = "the reference file holds nothing to compare with"
        continue
    try:
      values |= m.of(name, samples, real, networks)
    except UserError as e:
      left_out[name] = str(e)
  return {k: v for k, v in values.items() if np.isfinite(v)}, left_out
