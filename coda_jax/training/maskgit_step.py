"""The loss of a MaskGIT on tokens of which some are masked (paper, section 4.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from coda_jax.config import MaskingSettings
from coda_jax.models.maskgit import MaskGIT
from coda_jax.ops.cross_entropy import CrossEntropy, cross_entropy


def draw_mask(
  key: PRNGKeyArray, settings: MaskingSettings, levels: np.ndarray, batch: int
) -> Bool[Array, "{batch} n"]:
  """Which tokens of each image are masked, at least one.

  Args:
    levels: int32 [N], the level of each position.
  """
  ratio_key, order_key = jax.random.split(key)
  n = len(levels)
  if settings.ratio == "beta":
    ratio = jax.random.beta(ratio_key, settings.a, settings.b, (batch,))
  else:
    ratio = jnp.cos(math.pi / 2 * jax.random.uniform(ratio_key, (batch,)))
  count = jnp.clip(jnp.ceil(ratio * n), 1, n).astype(jnp.int32)
  return _mask_of(order_key, count, settings.order, levels)


def _mask_of(
  key: PRNGKeyArray, count: Int[Array, "b"], order: str, levels: np.ndarray
) -> Bool[Array, "b n"]:
  """Masks of `count` tokens of each image, random ones, or random ones of the finest levels."""
  score = jax.random.uniform(key, (len(count), len(levels)))
  if order == "coarse_to_fine":
    score += levels
  rank = jnp.argsort(jnp.argsort(-score, 1), 1)  # 0 is the first to be masked
  return rank < count[:, None]


def masked_loss(
  model: MaskGIT,
  ids: Integer[Array, "b n"],
  condition: Int[Array, "b"] | Float[Array, "b t e"],
  key: PRNGKeyArray,
  masking: MaskingSettings,
  *,
  label_smoothing: float = 0.0,
  class_dropout: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, "3 levels"]]:
  """(mean cross-entropy of the masked tokens, sums per level).

  The mean weighs levels by `masking.level_balance`. The sums are those of masked tokens, of their
  losses without that weight, and of right guesses.

  Args:
    ids: codes of all levels.
    condition: what `model.condition` takes: classes, -1 for none, or embeddings of texts.
    key: of the mask and of the conditions that are dropped.
    label_smoothing: part of the target spread evenly over all codes that the loss is among.
    class_dropout: part of the images whose condition is replaced by the one that stands for none.
  """
  c = model.config
  sizes = np.array([p * p for p in c.patch_sizes], np.float32)
  balance = (sizes**-masking.level_balance)[c.levels]
  mask_key, drop_key = jax.random.split(key)
  ids = ids.astype(jnp.int32)
  mask = draw_mask(mask_key, masking, c.levels, len(ids))
  drop = jax.random.bernoulli(drop_key, class_dropout, (len(ids),))
  hidden = model(jnp.where(mask, c.mask_id, ids), model.condition.drop(condition, drop))
  masked = mask.astype(jnp.float32)
  weight = masked * balance
  loss, correct = _cross_entropy(model, hidden, ids, weight, label_smoothing)
  per_token = jnp.stack([masked, loss / balance, masked * correct])
  of_level = jax.nn.one_hot(c.levels, len(c.patch_sizes), dtype=jnp.float32)
  sums = jnp.einsum("kbn,nl->kl", per_token, of_level, precision="highest")
  return loss.sum() / weight.sum(), sums


def bits_of_images(
  model: MaskGIT,
  ids: Integer[Array, "b n"],
  condition: Int[Array, "b"] | Float[Array, "b t e"],
  key: PRNGKeyArray,
  order: str,
) -> Float[Array, "b"]:
  """One draw of the bits that the model needs to say each image's tokens.

  Its mean over draws is the mean of -log2 p over the orders in which tokens may be revealed one at
  a time, and so an upper bound of -log2 p(tokens): N times the loss of a token that may come next,
  behind a random number of known ones (Hoogeboom et al., arXiv 2110.02037, section 2). It compares
  generators of different tokens, and of different ways of masking in training.

  Args:
    ids: codes of all levels.
    condition: what `model.condition` takes.
    order: "uniform": every order of all tokens; "coarse_to_fine": those that finish a level before
      the next one.
  """
  levels, n = model.config.levels, model.config.tokens
  count_key, order_key = jax.random.split(key)
  # Spread evenly over the batch: less variance, the same mean.
  progress = (jax.random.uniform(count_key) + jnp.arange(len(ids)) / len(ids)) % 1
  count = jnp.minimum(progress * n, n - 1).astype(jnp.int32) + 1
  return _bits(model, ids, condition, _mask_of(order_key, count, order, levels), order)


def _bits(model: MaskGIT, ids, condition, mask, order: str) -> Float[Array, "b"]:
  """N times the mean of -log2 p over the masked tokens that may come next."""
  c, levels = model.config, model.config.levels
  ids = ids.astype(jnp.int32)
  following = mask
  if order == "coarse_to_fine":
    coarsest = jnp.where(mask, levels, len(c.patch_sizes)).min(1, keepdims=True)
    following = mask & (levels == coarsest)
  hidden = model(jnp.where(mask, c.mask_id, ids), condition)
  weights = following / following.sum(1, keepdims=True)
  loss = _cross_entropy(model, hidden, ids, weights.astype(jnp.float32), 0.0).loss
  return c.tokens * loss.sum(1) / math.log(2)


def _cross_entropy(
  model: MaskGIT,
  hidden: Float[Array, "b n d"],
  ids: Int[Array, "b n"],
  weights: Float[Array, "b n"],
  label_smoothing: float,
) -> CrossEntropy:
  """Of each token, among all codes, or among those of its level if levels have their own."""
  c = model.config
  table, bias = model.output_table()
  if c.factors is not None:
    how = {"weights": weights, "label_smoothing": label_smoothing}
    return c.factors.cross_entropy(hidden, table, bias, ids, **how)
  found = []
  token = code = 0
  for n, v in zip(
    [p * p for p in c.patch_sizes] if c.level_codes else [c.tokens],
    c.level_codes or [c.codebook_size],
    strict=True,
  ):
    at, of = np.s_[:, token : token + n], np.s_[code : code + v]
    part = cross_entropy(
      hidden[at].reshape(-1, hidden.shape[-1]),
      table[of],
      bias[of],
      ids[at].reshape(-1) - code,
      weights=weights[at].reshape(-1),
      label_smoothing=label_smoothing,
    )
    found.append([x.reshape(len(ids), n) for x in part])
    token, code = token + n, code + v
  return CrossEntropy(*(jnp.concatenate(x, 1) for x in zip(*found, strict=True)))
