import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.evaluation.inception_score import ClassSums


def adms(logits, split):
  """The formula of ADM's evaluator, on all samples at once."""
  p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
  scores = []
  for i in range(0, len(p), split):
    part = p[i : i + split]
    kl = part * (np.log(part) - np.log(part.mean(0, keepdims=True)))
    scores.append(np.exp(kl.sum(1).mean()))
  return np.mean(scores), np.std(scores)


def test_sums_of_any_parts_give_adms_score():
  logits = np.random.default_rng(0).normal(0, 2, (23, 6)).astype(np.float32)
  total = None
  for start, stop in ((7, 8), (0, 7), (20, 23), (8, 20)):  # also not in order
    part = ClassSums.of(logits[start:stop], start, split=10)
    total = part if total is None else total.merge(part)
  np.testing.assert_allclose(total.score(), adms(logits.astype(float), 10), rtol=1e-9)
  assert total.counts.tolist() == [10, 10, 3]


def test_known_scores():
  """Sure and evenly spread over 4 classes: 4; undecided, or always one class: 1."""
  sure = 100 * np.tile(np.eye(4, dtype=np.float32), (5, 1))
  for logits, score in ((sure, 4), (0 * sure, 1), (np.roll(sure[:1], 1).repeat(9, 0), 1)):
    assert ClassSums.of(logits, 0).score()[0] == pytest.approx(score, rel=1e-6)


def test_no_images():
  with pytest.raises(UserError, match="needs images"):
    ClassSums.of(np.zeros((0, 3), np.float32), 0).score()
