"""The sampler against distributions that are known, and what must not change its results."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays
from coda_jax.errors import UserError
from coda_jax.generation import sampler
from coda_jax.generation.masking import masked_counts
from coda_jax.generation.sampler import SamplerSettings
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from tests.generation import oracle

CONFIG = oracle.CONFIG
N, V, MASK = CONFIG.tokens, CONFIG.codebook_size, CONFIG.mask_id
PLAIN = SamplerSettings(steps=4, guidance=0)


def softmax(x):
  p = np.exp(x - x.max(-1, keepdims=True))
  return p / p.sum(-1, keepdims=True)


@functools.cache
def bound():
  return sampler.bind(oracle.Oracle(oracle.logits()))


def draw(settings, batch=3, condition=0, seed=0, ids=None, **more):
  ids = np.full((batch, N), MASK) if ids is None else ids
  out = bound()(ids, np.full(batch, condition), jax.random.key(seed), settings, **more)
  return jax.tree.map(np.asarray, out)


def chi_square(ids, p):
  """Sum over positions of Pearson's statistic, and its degrees of freedom; rare codes together."""
  total, freedom = 0.0, 0
  for n in range(N):
    seen, expected = np.bincount(ids[:, n], minlength=V), p[n] * len(ids)
    rare = expected < 8
    seen = np.append(seen[~rare], seen[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    total += float(np.sum((seen - expected)[keep] ** 2 / expected[keep]))
    freedom += int(keep.sum()) - 1
    if seen[~keep].sum():  # a code that is impossible
      return np.inf, 1
  return total, freedom


@pytest.mark.parametrize(
  "settings",
  [
    PLAIN,
    pytest.param(dataclasses.replace(PLAIN, temperature=0.7, top_k=40), marks=pytest.mark.slow),
    pytest.param(
      dataclasses.replace(PLAIN, top_p=0.8, order="coarse_to_fine"), marks=pytest.mark.slow
    ),
    # One step only: the confidence can choose nothing, and guidance is its full value.
    dataclasses.replace(PLAIN, steps=1, guidance=0.5),
  ],
)
def test_marginals(settings):
  class_logits, null_logits = oracle.logits()
  s = class_logits + settings.guidance * (class_logits - null_logits)
  p = softmax(s / settings.temperature)
  if settings.top_k:
    p = np.where(p >= np.sort(p, -1)[:, -settings.top_k, None], p, 0)
  if settings.top_p:
    down = -np.sort(-p, -1)
    kept = (np.cumsum(down, -1) - down < settings.top_p).sum(-1)
    p = np.where(p >= down[np.arange(N), kept - 1][:, None], p, 0)
  p /= p.sum(-1, keepdims=True)
  # All at random: a confident choice of positions would prefer likely codes.
  settings = dataclasses.replace(settings, choice_temperature=1e6)
  if settings.steps > 1:  # the last step has no noise, but no choice either
    settings = dataclasses.replace(settings, schedule="linear")
  ids = draw(settings, batch=4000).ids
  found, freedom = chi_square(ids, p)
  assert abs(found - freedom) < 4 * (2 * freedom) ** 0.5
  wrong, freedom = chi_square(ids, np.roll(p, 1, axis=0))  # the test can fail
  assert wrong > freedom + 40 * (2 * freedom) ** 0.5


def test_top_k_of_one_is_argmax():
  ids = draw(dataclasses.replace(PLAIN, top_k=1)).ids
  np.testing.assert_array_equal(ids, np.tile(oracle.logits()[0].argmax(-1), (3, 1)))


def test_guidance():
  class_logits, null_logits = oracle.logits()
  greedy = dataclasses.replace(PLAIN, top_k=1)
  unconditional = draw(greedy, condition=CONFIG.null_class).ids
  np.testing.assert_array_equal(unconditional[0], null_logits.argmax(-1))
  # The null class guided by itself stays as it is.
  guided = draw(dataclasses.replace(greedy, guidance=3.0), condition=CONFIG.null_class).ids
  np.testing.assert_array_equal(guided, unconditional)
  # A constant ramp has its value at every step, a linear one begins with 0.
  s = class_logits + 3 * (class_logits - null_logits)
  constant = dataclasses.replace(greedy, guidance=3.0, guidance_ramp="constant")
  np.testing.assert_array_equal(draw(constant).ids[0], s.argmax(-1))
  linear = draw(dataclasses.replace(constant, guidance_ramp="linear"), keep_steps=True)
  first, end = linear.history[0][0], linear.history[-2][0] == MASK
  np.testing.assert_array_equal(first[first != MASK], class_logits.argmax(-1)[first != MASK])
  np.testing.assert_array_equal(linear.ids[0][end], s.argmax(-1)[end])


def test_ramps():
  scales = {
    ramp: SamplerSettings(steps=3, guidance=2, guidance_ramp=ramp).guidance_scales().tolist()
    for ramp in sampler.RAMPS
  }
  assert scales == {"linear": [0, 1, 2], "constant": [2, 2, 2], "cosine": [0, 1, 2]}
  assert SamplerSettings(steps=1, guidance=2).guidance_scales().tolist() == [2]


@pytest.mark.parametrize("order", ["uniform", "coarse_to_fine"])
@pytest.mark.parametrize("schedule", ["cosine", "arccos"])
def test_counts_and_order(order, schedule):
  settings = dataclasses.replace(PLAIN, steps=6, order=order, schedule=schedule)
  out = draw(settings, keep_steps=True)
  masked = out.history == MASK
  expected = masked_counts(schedule, 6, N)
  np.testing.assert_array_equal(masked.sum(-1), np.tile(expected[:, None], (1, 3)))
  np.testing.assert_array_equal(out.history[-1], out.ids)
  for before, after in zip(out.history, out.history[1:], strict=False):
    np.testing.assert_array_equal(after[before != MASK], before[before != MASK])
  broken = [
    CONFIG.levels[~step].max() > CONFIG.levels[step].min()
    for step in masked[:-1].reshape(-1, N)
    if step.any() and not step.all()
  ]
  assert not any(broken) if order == "coarse_to_fine" else any(broken)


def test_without_noise_the_surest_come_first():
  out = draw(dataclasses.replace(PLAIN, top_k=1, choice_temperature=0), batch=1, keep_steps=True)
  p = softmax(oracle.logits()[0]).max(-1)
  first = out.history[0][0] != MASK
  assert p[first].min() > p[~first].max()


def test_known_tokens_stay():
  rng = np.random.default_rng(0)
  ids = rng.integers(0, V, (3, N))
  masked = rng.random((3, N)) < np.array([[0.9], [0.1], [0.0]])
  masked[1, :2] = True  # fewer than steps
  ids = np.where(masked, MASK, ids)
  settings = dataclasses.replace(PLAIN, steps=8)
  out = draw(settings, ids=ids, keep_steps=True)
  assert (out.ids < V).all()
  np.testing.assert_array_equal(out.ids[~masked], ids[~masked])
  left = (out.history == MASK).sum(-1)
  np.testing.assert_array_equal(left, masked_counts("cosine", 8, masked.sum(1)))


def test_chunks_and_seeds():
  settings = dataclasses.replace(PLAIN, guidance=1.0, order="coarse_to_fine")
  whole = draw(settings).ids
  for chunk in (4, N + 5):
    np.testing.assert_array_equal(draw(settings, chunk_size=chunk).ids, whole)
  assert (draw(settings, seed=1).ids != whole).mean() > 0.5
  assert (whole[0] != whole[1]).mean() > 0.5  # each image has its own random numbers


def test_numbers_compile_nothing(monkeypatch):
  draw(PLAIN)
  traced, call = [], oracle.Oracle.__call__
  monkeypatch.setattr(oracle.Oracle, "__call__", lambda *args: traced.append(1) or call(*args))
  for change in ({"temperature": 0.5}, {"choice_temperature": 0.0}, {"schedule": "linear"}):
    draw(dataclasses.replace(PLAIN, **change), seed=5)
  assert not traced
  draw(dataclasses.replace(PLAIN, top_k=3))
  assert traced


REAL = MaskGITConfig(
  width=32, depth=0, heads=2, num_classes=3, patch_sizes=(1, 2, 4), codebook_size=64
)


@functools.cache
def real_model():
  codes = jax.random.normal(jax.random.key(5), (64, 16))
  return nnx.jit(lambda: MaskGIT(REAL, codes=codes, rngs=nnx.Rngs(0)))()


def sample_real(rows) -> np.ndarray:
  model, key = real_model(), jax.random.key(7)
  ids, condition = np.full((len(rows), REAL.tokens), REAL.mask_id), np.asarray(rows) % 3
  settings = SamplerSettings(steps=4)
  return np.asarray(
    sampler.sample(model, ids, condition, key, settings, index=np.asarray(rows)).ids
  )


@pytest.mark.slow
def test_batch_and_devices_change_nothing():
  rows = np.arange(8)
  whole = sample_real(rows)
  assert len({tuple(x) for x in whole}) == 8
  for size in (1, 2, 4):
    parts = [sample_real(rows[i : i + size]) for i in range(0, 8, size)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
  assert len(jax.devices()) == 8
  mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("data",))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  ids = jax.device_put(np.full((8, REAL.tokens), REAL.mask_id, np.int32), split)
  condition = jax.device_put(rows.astype(np.int32) % 3, split)
  run = sampler.bind(real_model(), 8)
  out = run(ids, condition, jax.random.key(7), SamplerSettings(steps=4)).ids
  assert len(out.sharding.device_set) == 8
  np.testing.assert_array_equal(out, whole)


def test_no_logits_of_all_tokens():
  """FLUX's 2240 x 65536 must not exist in any form."""
  config = MaskGITConfig(
    width=8, depth=0, heads=1, num_classes=1, patch_sizes=(4, 16), codebook_size=4096
  )
  model = nnx.eval_shape(lambda: MaskGIT(config, rngs=nnx.Rngs(0)))
  graphdef, shapes = arrays.split(model)
  form = sampler.Form(True, 4, True, True, False, chunk=16)
  n = config.tokens
  run = jax.jit(lambda shapes, *args: sampler.loop(arrays.merge(graphdef, shapes), *args, form))
  zero, key = jnp.zeros(1, jnp.int32), jax.random.key(0)
  steps = SamplerSettings(steps=4).per_step(np.array([n]))
  index = zero.astype(jnp.uint32)
  ids = jnp.zeros((1, n), jnp.int32)
  found = run.lower(shapes, ids, zero, None, index, key, steps).as_text()
  assert f"16x{config.codebook_size}x" in found
  assert f"{n}x{config.codebook_size}x" not in found


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"steps": 0}, "at least 1"),
    ({"schedule": "square"}, "'square'.*cosine"),
    ({"order": "fine"}, "'fine'.*uniform"),
    ({"guidance_ramp": "up"}, "'up'.*linear"),
    ({"temperature": 0.0}, "above 0"),
    ({"temperature": float("nan")}, "above 0"),
    ({"guidance": -1.0}, "at least 0"),
    ({"top_k": 0}, "top_k is 0"),
    ({"top_p": 1.5}, "top_p is 1.5"),
  ],
)
def test_bad_settings(change, message):
  with pytest.raises(UserError, match=message):
    SamplerSettings(**change)


def test_more_steps_than_tokens():
  with pytest.raises(UserError, match="steps is 22.*21 tokens"):
    draw(SamplerSettings(steps=22))
