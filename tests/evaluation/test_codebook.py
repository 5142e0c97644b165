import jax
import numpy as np
import pytest

from coda_jax.evaluation.codebook import CodebookUsage, code_age, count_codes, over_levels

IDS = [np.array([[[0]], [[2]]], np.int32), np.array([[[0, 1], [1, 1]], [[3, 3], [0, 0]]], np.int32)]


def test_counts_on_host_and_device_agree():
  usage = CodebookUsage.count(IDS, 5)
  assert [x.tolist() for x in usage.counts] == [[1, 0, 1, 0, 0], [3, 3, 0, 2, 0]]
  count = jax.jit(count_codes, static_argnums=1)
  device = count([jax.numpy.asarray(x) for x in IDS], ((0, 5), (0, 5)))
  assert np.array_equal(device, usage.counts)
  assert np.array_equal(over_levels(device, 5), usage.overall)
  assert usage.at_level(1).tolist() == [3, 3, 0, 2, 0] and usage.tokens == 10


def test_figures():
  usage = CodebookUsage.count(IDS, 5)
  assert usage.utilization == 0.8
  assert usage.level_utilization.tolist() == [0.4, 0.6]
  assert usage.tokens_per_code == 2.0
  np.testing.assert_allclose(usage.level_tokens_per_code, [0.4, 1.6])
  p = np.array([4, 3, 1, 2]) / 10
  np.testing.assert_allclose(usage.perplexity, np.exp(-np.sum(p * np.log(p))))
  np.testing.assert_allclose(usage.level_perplexity[0], 2)
  np.testing.assert_allclose(usage.entropy, -np.sum(p * np.log2(p)))
  np.testing.assert_allclose(usage.level_entropy[0], 1)


def test_merging_is_counting_together():
  halves = [CodebookUsage.count([level[i : i + 1] for level in IDS], 5) for i in range(2)]
  merged = CodebookUsage.empty(5, (5, 5)).merge(halves[0]).merge(halves[1])
  assert np.array_equal(merged.counts, CodebookUsage.count(IDS, 5).counts)


def test_age_counts_the_steps_since_last_use():
  age = np.zeros(3, np.int32)
  for counts in ([1, 0, 0], [0, 0, 2], [0, 0, 1]):
    age = code_age(age, np.array(counts))
  assert age.tolist() == [2, 3, 0]


def test_levels_with_codes_of_their_own():
  ids = [np.array([0, 1, 0]), np.array([2, 2])]
  usage = CodebookUsage.count(ids, 6, (2, 4)).merge(CodebookUsage.empty(6, (2, 4)))
  assert [x.tolist() for x in usage.counts] == [[2, 1], [2, 0, 0, 0]]
  device = count_codes([jax.numpy.asarray(x) for x in ids], ((0, 2), (2, 6)))
  assert over_levels(device, 6).tolist() == usage.overall.tolist() == [2, 1, 2, 0, 0, 0]
  assert usage.at_level(1).tolist() == [0, 0, 2, 0, 0, 0]
  assert usage.level_utilization.tolist() == [1, 0.25]
  assert usage.level_tokens_per_code.tolist() == [1.5, 0.5]
  assert usage.utilization == 0.5
  np.testing.assert_allclose(usage.uniform_level_utilization, [1 - 0.5**3, 1 - 0.75**2])


def test_uniform_utilization_by_simulation():
  draws = np.random.default_rng(0).integers(0, 50, (2000, 70))
  seen = np.mean([len(np.unique(d)) for d in draws]) / 50
  usage = CodebookUsage.count([np.zeros(0, int), draws[0]], 50)
  none, reached = usage.uniform_level_utilization
  assert none == 0
  assert reached == pytest.approx(seen, abs=0.005)
