import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import config as c
from coda_jax.models.conditions import TextShape
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from coda_jax.training.maskgit_step import _bits, bits_of_images, draw_mask, masked_loss
from tests.conftest import assert_close


@pytest.mark.parametrize("ratio", ["beta", "cosine"])
def test_masks(ratio):
  levels = np.repeat(np.arange(3), [1, 4, 16])
  key = jax.random.key(0)
  mask = np.asarray(draw_mask(key, c.MaskingSettings(ratio=ratio), levels, 4000))
  mean = 12 / 15 if ratio == "beta" else 2 / np.pi
  assert mask.any(1).all() and abs(mask.mean() - mean) < 0.04
  per_token = mask.mean(0)
  assert np.ptp(per_token) < 0.05  # uniform over positions
  ordered = c.MaskingSettings(ratio=ratio, order="coarse_to_fine")
  mask = np.asarray(draw_mask(key, ordered, levels, 500))
  partly = [mask[:, levels == i].any(1) & ~mask[:, levels == i].all(1) for i in range(3)]
  assert (sum(partly) <= 1).all()
  for coarse, fine in ((0, 1), (1, 2)):  # a coarse token is masked only if all finer ones are
    assert mask[mask[:, levels == coarse].any(1)][:, levels == fine].all()


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_level_balance(balance):
  """The gradient's loss weighs levels; what is logged of each level does not depend on it."""
  m = MaskGITConfig(16, 0, 1, 2, (1, 2, 4), 32, embedding="table")
  settings = c.MaskingSettings(level_balance=balance)
  model = MaskGIT(m, rngs=nnx.Rngs(0))
  ids = jax.random.randint(jax.random.key(1), (8, 21), 0, 32)
  run = nnx.jit(lambda model, *args: masked_loss(model, *args, settings))
  loss, (count, losses, _) = jax.device_get(
    run(model, ids, jnp.zeros(8, jnp.int32), jax.random.key(0))
  )
  weight = np.array([1.0, 4.0, 16.0]) ** -balance
  assert_close(loss, (losses * weight).sum() / (count * weight).sum(), 1e-5)
  np.testing.assert_allclose(losses / count, np.log(32), rtol=0.1)  # a fresh model's guess


def test_levels_with_codes_of_their_own():
  """The loss is that of the sampler's distribution: codes of other levels have no part in it."""
  m = MaskGITConfig(16, 0, 1, 2, (1, 2), 7, embedding="table", level_codes=(3, 4))
  model = MaskGIT(m, rngs=nnx.Rngs(0))
  model.bias[...] = jnp.arange(7.0)
  ids = jax.random.randint(jax.random.key(1), (8, 5), 0, 3) + 3 * (m.levels > 0)
  settings, classes = c.MaskingSettings(ratio="cosine"), jnp.zeros(8, jnp.int32)

  @nnx.jit
  def run(model):
    key = jax.random.key(0)
    mask = draw_mask(jax.random.split(key)[0], settings, m.levels, 8)
    logits = model.logits(model(jnp.where(mask, m.mask_id, ids), classes))
    theirs = m.levels[:, None] != m.level_of_code
    losses = nnx.log_softmax(jnp.where(theirs, -jnp.inf, logits))
    wanted = -jnp.take_along_axis(losses, ids[..., None], -1)[..., 0].mean(where=mask)
    return masked_loss(model, ids, classes, key, settings)[0], wanted

  loss, wanted = run(model)
  assert_close(loss, wanted, 1e-5)


@pytest.mark.parametrize("order", ["uniform", "coarse_to_fine"])
def test_bits_of_images(order):
  """Their mean is that of -log2 p over all orders of revealing one token after the other."""
  m = MaskGITConfig(16, 0, 1, 2, (1, 2), 7, embedding="table", level_codes=(3, 4))
  model = MaskGIT(m, rngs=nnx.Rngs(0))
  model.embedding.embedding[...] *= 50  # else what is known hardly matters
  model.bias[...] = jnp.arange(7.0)
  ids = jnp.array([[1, 3, 6, 4, 5]])
  # -log2 p of every token behind every set of known ones
  known = np.array([*itertools.product((False, True), repeat=5)])
  theirs = m.levels[:, None] != m.level_of_code
  logits = model.logits(model(jnp.where(known, ids, m.mask_id), jnp.zeros(len(known), jnp.int32)))
  table = -nnx.log_softmax(jnp.where(theirs, -jnp.inf, logits))[:, np.arange(5), ids[0]]
  cost = {tuple(k): np.asarray(row) / np.log(2) for k, row in zip(known, table, strict=True)}
  orders = [
    o
    for o in itertools.permutations(range(5))
    if order == "uniform" or m.levels[[*o]].argmin() == 0
  ]
  assert len(orders) == (120 if order == "uniform" else 24)
  wanted = np.mean(
    [sum(cost[tuple(i in o[:n] for i in range(5))][o[n]] for n in range(5)) for o in orders]
  )
  drawn = np.array([[i in o[:n] for i in range(5)] for o in orders for n in range(5)])
  repeated = jnp.broadcast_to(ids, drawn.shape), jnp.zeros(len(drawn), jnp.int32)
  assert_close(_bits(model, *repeated, jnp.asarray(~drawn), order).mean(), wanted, 1e-5)
  many = jnp.broadcast_to(ids, (4000, 5)), jnp.zeros(4000, jnp.int32)
  assert_close(bits_of_images(model, *many, jax.random.key(0), order).mean(), wanted, 0.01)


@pytest.mark.slow
def test_dropped_texts_do_not_count():
  m = MaskGITConfig(16, 0, 1, 0, (1, 2), 32, embedding="table", text=TextShape(3, 4))
  model = MaskGIT(m, rngs=nnx.Rngs(0))
  model.condition.empty[...] = jnp.ones((3, 4))
  ids = jax.random.randint(jax.random.key(1), (8, 5), 0, 32)
  rng = np.random.default_rng(0)
  texts = [jnp.asarray(rng.normal(size=(8, 3, 4)), jnp.float16) for _ in range(2)]

  @nnx.jit(static_argnames="dropout")
  def run(model, texts, dropout):
    how = {"class_dropout": dropout}
    return masked_loss(model, ids, texts, jax.random.key(0), c.MaskingSettings(), **how)[0]

  kept, dropped = ([float(run(model, t, dropout=p)) for t in texts] for p in (0.0, 1.0))
  assert kept[0] != kept[1] and dropped[0] == dropped[1]
  assert_close(dropped[0], run(model, jnp.ones_like(texts[0]), dropout=0.0), 1e-6)
