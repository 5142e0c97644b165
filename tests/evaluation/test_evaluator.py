import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from coda_jax import sharding
from coda_jax.config import MeshSettings
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation import evaluator
from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.evaluator import evaluate, in_batches, outputs
from coda_jax.evaluation.frechet import FeatureStatistics
from coda_jax.evaluation.image_quality import Quality, psnr, ssim, to_uint8
from coda_jax.evaluation.inception_score import ClassSums
from coda_jax.evaluation.metrics import QuantizationError, Results
from coda_jax.evaluation.reconstruction import Batch, BatchResult, Encoded
from coda_jax.evaluation.rows import Rows
from tests.conftest import assert_close

CODES = 8


def stand_in(images) -> BatchResult:
  """Latents are mean colours of 4 x 4 pixels; a code stands for a brightness."""
  x = normalize(images)
  latents = x.reshape(len(x), 4, 4, 4, 4, 3).mean((2, 4))
  coarse, fine = latents.mean((1, 2, 3), keepdims=True), latents.mean(3, keepdims=True)
  ids = [jnp.floor((m[..., 0] + 1) / 2 * CODES).astype(jnp.int32) for m in (coarse, fine)]
  quantized = jnp.stack([jnp.broadcast_to(m, latents.shape) for m in (coarse, fine)], axis=1)
  return BatchResult.of(Encoded(ids, latents, quantized, CODES), 0.9 * x, x.std((1, 2, 3)))


def photos(count: int, *size: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def assert_same(ours: Results, theirs: Results, rtol: float = 0):
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def test_metrics_are_those_of_the_valid_images():
  images = photos(3, 16, 16)
  batches = in_batches(images, 2)
  assert [batch["valid"].tolist() for batch in batches] == [[True, True], [True, False]]
  results = evaluate(jax.jit(stand_in), batches)
  x = normalize(images)
  quality, error, usage = (results[kind] for kind in (Quality, QuantizationError, CodebookUsage))
  np.testing.assert_array_equal(quality.psnr, psnr(images, to_uint8(0.9 * x)))
  np.testing.assert_array_equal(quality.ssim, ssim(images, to_uint8(0.9 * x)))
  np.testing.assert_allclose(quality.lpips, x.std((1, 2, 3)), rtol=1e-5)
  assert [x.sum() for x in usage.counts] == [3, 48]
  latents = x.reshape(3, 4, 4, 4, 4, 3).mean((2, 4))
  np.testing.assert_allclose(error.latent_variance, latents.var((0, 1, 2)).mean(), rtol=1e-4)
  expected = [latents.var((1, 2, 3)), latents.var(3).mean((1, 2))]
  np.testing.assert_allclose(error.levels, np.stack(expected, axis=1), rtol=1e-4)


def test_outputs_start_a_batch_before_the_last_is_fetched():
  events = []

  def function(images):
    events.append(f"start {len(events)}")
    return {"sum": images.astype(np.int32).sum((1, 2, 3))}

  images = photos(5, 2, 2)
  batches = [batch | {"row": 2 * i + np.arange(2)} for i, batch in enumerate(in_batches(images, 2))]
  found = []
  for batch, result in outputs(function, batches):
    events.append("fetched")
    found += zip(batch["row"], result["sum"], strict=True)
    assert len(batch["image"]) == len(batch["row"])
  assert [e.split()[0] for e in events] == ["start", "start", "fetched", "start", *["fetched"] * 2]
  assert found == [(i, x.astype(int).sum()) for i, x in enumerate(images)]
  assert batches[2]["valid"].tolist() == [True, False]  # those given are as they were


@pytest.mark.parametrize("settings", [MeshSettings(), MeshSettings(data=2, fsdp=2, model=2)])
def test_eight_devices_find_what_one_finds(settings):
  images = photos(11, 16, 16)
  mesh = sharding.make_mesh(settings)
  over_all = jax.jit(stand_in, out_shardings=sharding.batch_sharding(mesh))
  batches = in_batches(images, 8)
  alone = evaluate(jax.jit(stand_in), batches)
  ours = evaluate(over_all, batches, mesh=mesh)
  assert ours[CodebookUsage].tokens == 11 * 17
  assert_same(ours, alone, rtol=1e-6)
  assert list(ours.summary()) == list(alone.summary())


def on_two_processes(monkeypatch, local: list) -> list:
  """What `of_processes` gives each of two threads that stand for two processes."""
  barrier, sent, found = threading.Barrier(2), [None, None], [None, None]

  rank = lambda: int(threading.current_thread().name)

  def process_allgather(x):
    """As of `multihost_utils`: arrays must have one shape and no more than 32 bits."""
    x = np.asarray(x)
    assert x.dtype.itemsize <= 4
    sent[rank()] = x
    barrier.wait()
    everything = np.stack(sent)  # of one shape, or this raises
    barrier.wait()
    return everything

  def broadcast_one_to_all(x, is_source):
    return np.sum(process_allgather(x if is_source else np.zeros_like(x)), 0, x.dtype)

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(jax, "process_index", rank)
  monkeypatch.setattr(evaluator.multihost_utils, "process_allgather", process_allgather)
  monkeypatch.setattr(evaluator.multihost_utils, "broadcast_one_to_all", broadcast_one_to_all)

  def run(rank: int):
    found[rank] = evaluator.of_processes(local[rank], [0, 1])

  threads = [threading.Thread(target=run, args=(i,), name=str(i)) for i in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  return found


@pytest.mark.parametrize("counts", [(3, 2), (4, 0)])
def test_all_processes_get_the_metrics_of_all(monkeypatch, counts):
  """Each with images of its own, or with none."""
  local = []
  for seed, count in enumerate(counts):
    images = photos(count, 16, 16, seed=seed)
    result = jax.device_get(jax.jit(stand_in)(images))
    local.append(Results.of(Batch(images, result)))
  expected = local[0].merge(local[1])
  for results in on_two_processes(monkeypatch, local):
    assert_same(results, expected)
    assert results.summary() == expected.summary()
    assert results[Quality].psnr.dtype == np.float64


def test_statistics_over_devices_and_processes_are_those_of_one(monkeypatch):
  """Mean, covariance and class sums of features, 8 devices on each of two processes."""
  rng = np.random.default_rng(0)
  weights = jnp.asarray(rng.normal(size=(16 * 16 * 3, 12)) / 30, jnp.float32)

  def features(x):
    return jax.nn.relu(normalize(x).reshape(len(x), -1) @ weights)

  mesh = sharding.make_mesh(MeshSettings())
  over_all = jax.jit(features, out_shardings=sharding.batch_sharding(mesh))
  images, local = photos(43, 16, 16), []
  for part in (slice(0, 20), slice(20, 43)):
    rows = [x for _, x in outputs(over_all, in_batches(images[part], 8), mesh)]
    sums = ClassSums.of(np.concatenate(rows), part.start, split=10)
    local.append((FeatureStatistics.of(Rows(rows)), sums))
  x = np.asarray(jax.jit(features)(images))
  expected = ClassSums.of(x, 0, split=10).score()
  for found in on_two_processes(monkeypatch, [a for a, _ in local]):
    assert found.count == 43
    np.testing.assert_allclose(found.mean, x.mean(0, np.float64), rtol=1e-6)
    assert_close(found.covariance, np.cov(x.T.astype(float)), 1e-6)
  for found in on_two_processes(monkeypatch, [b for _, b in local]):
    np.testing.assert_allclose(found.score(), expected, rtol=1e-6)


def test_no_images():
  with pytest.raises(UserError, match="no images to evaluate"):
    evaluate(lambda x: x, [])
