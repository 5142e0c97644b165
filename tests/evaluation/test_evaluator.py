import functools
import threading

import jax
import numpy as np
import pytest

from coda_jax import arrays, sharding
from coda_jax.config import MeshSettings
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation import evaluator
from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.evaluator import evaluate, in_batches, outputs
from coda_jax.evaluation.image_quality import Quality, psnr, ssim, to_uint8
from coda_jax.evaluation.metrics import QuantizationError, Results
from coda_jax.evaluation.reconstruction import Batch, BatchResult, encode_levels, reconstruct_batch
from tests import tiny

_measured = arrays.jit_module(
  lambda tokenizer, x: (
    encode_levels(tokenizer, normalize(x)),
    reconstruct_batch(tokenizer, normalize(x)),
  )
)


def photos(count: int, *size: int, seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), np.uint8)


def assert_same(ours: Results, theirs: Results, rtol: float = 0):
  pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
  for a, b in pairs:
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def test_metrics_are_those_of_the_valid_images():
  images = photos(3, 16, 16)
  both = _measured(tiny.tokenizer())
  results = evaluate(lambda x: both(x)[1], in_batches(images, 2))
  # The images in one batch of three, whose last row is not valid, go the other way.
  encoded, found = both(np.concatenate([images, images[:1]]))
  made = np.asarray(found.images)[:3]
  quality, error, usage = (results[kind] for kind in (Quality, QuantizationError, CodebookUsage))
  np.testing.assert_allclose(quality.psnr, psnr(images, to_uint8(made)), rtol=1e-4)
  np.testing.assert_allclose(quality.ssim, ssim(images, to_uint8(made)), rtol=1e-3)
  assert quality.lpips is None
  assert usage.counts.sum(axis=1).tolist() == [3, 12, 27, 192]
  latents = np.asarray(encoded.latents)[:3]
  np.testing.assert_allclose(error.latent_variance, latents.var((0, 1, 2)).mean(), rtol=1e-4)
  squares = np.square(latents[:, None] - np.asarray(encoded.quantized)[:3]).mean((2, 3, 4))
  np.testing.assert_allclose(error.levels, squares, rtol=1e-4)


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
  graphdef, params = arrays.split(tiny.tokenizer())

  def function(params, images):
    return reconstruct_batch(arrays.merge(graphdef, params), normalize(images))

  mesh = sharding.make_mesh(settings)
  batch = sharding.batch_sharding(mesh)
  over_all = jax.jit(function, in_shardings=(sharding.replicated(mesh), batch), out_shardings=batch)
  batches = in_batches(images, 8)
  alone = evaluate(functools.partial(jax.jit(function), params), batches)
  ours = evaluate(functools.partial(over_all, params), batches, mesh=mesh)
  assert ours[CodebookUsage].counts.sum() == 11 * 78
  assert_same(ours, alone, rtol=2e-4)
  assert list(ours.summary()) == list(alone.summary())


def results_of(count: int, seed: int) -> Results:
  rng = np.random.default_rng(seed)
  result = BatchResult(
    images=rng.uniform(-1, 1, (count, 16, 16, 3)).astype(np.float32),
    lpips=rng.uniform(size=count).astype(np.float32),
    ids=[rng.integers(0, 64, (count, p, p), np.int32) for p in (1, 2)],
    level_errors=rng.uniform(size=(count, 2)).astype(np.float32),
    latent_mean=rng.normal(size=(count, 4)).astype(np.float32),
    latent_power=rng.uniform(size=count).astype(np.float32),
    codebook_size=64,
  )
  return Results.of(Batch(photos(count, 16, 16, seed=seed), result))


@pytest.mark.parametrize("counts", [(3, 2), (4, 0)])
def test_all_processes_get_the_metrics_of_all(monkeypatch, counts):
  """Two threads stand for two processes, each with images of its own, or with none."""
  local = [results_of(count, seed) for seed, count in enumerate(counts)]
  barrier, sent, found = threading.Barrier(2), [None, None], [None, None]

  def process_allgather(x):
    """As of `multihost_utils`: arrays must have one shape and no more than 32 bits."""
    x = np.asarray(x)
    assert x.dtype.itemsize <= 4
    sent[int(threading.current_thread().name)] = x
    barrier.wait()
    everything = np.stack(sent)  # of one shape, or this raises
    barrier.wait()
    return everything

  monkeypatch.setattr(jax, "process_count", lambda: 2)
  monkeypatch.setattr(evaluator.multihost_utils, "process_allgather", process_allgather)

  def run(rank: int):
    found[rank] = evaluator.of_all_processes(local[rank])

  threads = [threading.Thread(target=run, args=(i,), name=str(i)) for i in range(2)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(60)
  expected = local[0].merge(local[1])
  for results in found:
    assert_same(results, expected)
    assert results.summary() == expected.summary()
    assert results[Quality].psnr.dtype == np.float64


def test_no_images():
  with pytest.raises(UserError, match="no images to evaluate"):
    evaluate(lambda x: x, [])
