"""Trains a MaskGIT on the tokens of a tokenizer (paper, section 4.1)."""

import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jaxtyping import Array, Bool, PRNGKeyArray

from coda_jax import sharding, weights
from coda_jax.config import MaskGITTrainConfig, MaskingSettings
from coda_jax.data import tokens
from coda_jax.errors import UserError
from coda_jax.functional import Arrays, Functional, part, take_apart
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from coda_jax.ops.cross_entropy import cross_entropy
from coda_jax.training import checkpoints
from coda_jax.training.logging import parameter_overview
from coda_jax.training.tokenizer_trainer import ema_decay, make_optimizer

TRAINED = (("Param", ""),)  # (variable type, regex over the path); the code values do not


@struct.dataclass
class GeneratorState:
  """Everything that an update changes; donated to it.

  Attributes:
    step: int32, updates done.
    params: what trains, by dotted path.
    ema: its moving average.
    optimizer: optax state.
    level_loss, level_accuracy: [levels], last seen: not every batch masks tokens of every level.
  """

  step: Any
  params: Any
  ema: Any
  optimizer: optax.OptState
  level_loss: Any
  level_accuracy: Any


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
  score = jax.random.uniform(order_key, (batch, n))
  if settings.order == "coarse_to_fine":
    score += levels
  rank = jnp.argsort(jnp.argsort(-score, 1), 1)  # 0 is the first to be masked
  return rank < count[:, None]


class MaskGITUpdate:
  """The pure part of a generator's training: functions of arrays, to be jitted.

  Attributes:
    model_config: the model's.
    model: its structure.
    learning_rate: by the updates done.
  """

  def __init__(
    self,
    config: MaskGITTrainConfig,
    model_config: MaskGITConfig,
    model: Functional,
    steps_per_epoch: int = 1,
  ):
    self.config, self.model_config, self.model = config, model_config, model
    self.steps_per_epoch = steps_per_epoch
    self.optimizer, self.learning_rate = make_optimizer(config.optimizer, config.steps)
    self._key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))

  def fresh_state(self, params: Arrays) -> GeneratorState:
    """The state before the first update."""
    levels = len(self.model_config.patch_sizes)
    return GeneratorState(
      step=jnp.zeros((), jnp.int32),
      params=jax.tree.map(jnp.copy, params),  # donated buffers must not be shared
      ema=jax.tree.map(jnp.copy, params),
      optimizer=self.optimizer.init(params),
      # With a type: a weak one would compile the second update anew.
      level_loss=jnp.full(levels, math.log(self.model_config.codebook_size), jnp.float32),
      level_accuracy=jnp.zeros(levels),
    )

  def sums(self, params: Arrays, frozen, ids, labels, key, smoothing: float, dropout: float):
    """(weighed mean loss, (masked tokens, losses and right guesses) per level [3, levels])."""
    c = self.model_config
    sizes = np.array([p * p for p in c.patch_sizes], np.float32)
    balance = (sizes**-self.config.masking.level_balance)[c.levels]
    mask_key, drop_key = jax.random.split(key)
    ids = ids.astype(jnp.int32)
    mask = draw_mask(mask_key, self.config.masking, c.levels, len(ids))
    drop = jax.random.bernoulli(drop_key, dropout, labels.shape) | (labels < 0)
    model = self.model.module(params, frozen)
    hidden = model(jnp.where(mask, c.mask_id, ids), jnp.where(drop, c.null_class, labels))
    masked = mask.astype(jnp.float32)
    weight = masked * balance
    found = cross_entropy(
      hidden.reshape(-1, hidden.shape[-1]),
      *model.output_table(),
      ids.reshape(-1),
      weights=weight.reshape(-1),
      label_smoothing=smoothing,
    )
    per_token = jnp.stack(
      [masked, found.loss.reshape(ids.shape) / balance, masked * found.correct.reshape(ids.shape)]
    )
    of_level = jax.nn.one_hot(c.levels, len(c.patch_sizes), dtype=jnp.float32)
    sums = jnp.einsum("kbn,nl->kl", per_token, of_level, precision="highest")
    return found.loss.sum() / weight.sum(), sums

  def update(
    self, state: GeneratorState, frozen: Arrays, batch: dict[str, jax.Array]
  ) -> tuple[GeneratorState, dict[str, jax.Array]]:
    """One update from {"ids": [accumulation, B, N], "label": [accumulation, B]}."""
    key = jax.random.fold_in(jax.random.wrap_key_data(self._key), state.step)
    n = len(batch["ids"])

    def mean_loss(params, i, ids, labels):
      return self.sums(
        params,
        frozen,
        ids,
        labels,
        jax.random.fold_in(key, i),
        self.config.label_smoothing,
        self.config.class_dropout,
      )

    def micro_batch(i, ids, labels):
      grad = jax.grad(mean_loss, has_aux=True)
      gradients, sums = grad(state.params, i, ids, labels)
      return jax.tree.map(lambda x: x / n, gradients), sums

    def add(total, x):
      return jax.tree.map(jnp.add, total, micro_batch(*x)), None

    ids, labels = batch["ids"], batch["label"]
    if n == 1:
      gradients, sums = micro_batch(0, ids[0], labels[0])
    else:
      shapes = jax.eval_shape(micro_batch, 0, ids[0], labels[0])
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      (gradients, sums), _ = jax.lax.scan(add, zeros, (jnp.arange(n), ids, labels))
    updates, optimizer = self.optimizer.update(gradients, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    decay = ema_decay(self.config.ema, state.step, self.steps_per_epoch)
    ema = jax.tree.map(lambda average, p: decay * average + (1 - decay) * p, state.ema, params)
    count, loss, correct = sums
    seen = jnp.maximum(count, 1)
    level_loss = jnp.where(count > 0, loss / seen, state.level_loss)
    level_accuracy = jnp.where(count > 0, correct / seen, state.level_accuracy)
    metrics = {
      "loss": loss.sum() / count.sum(),
      "accuracy": correct.sum() / count.sum(),
      "level_loss": level_loss,
      "level_accuracy": level_accuracy,
      "masked": count.sum() / ids.size,
      "grad_norm": optax.global_norm(gradients),
      "learning_rate": self.learning_rate(state.step),
    }
    new = GeneratorState(state.step + 1, params, ema, optimizer, level_loss, level_accuracy)
    return new, metrics

  def eval_sums(self, ema: Arrays, frozen: Arrays, batch, number):
    """Sums per level [3, levels] of the held-out batch `number`."""
    key = jax.random.fold_in(jax.random.wrap_key_data(self._key), np.uint32(2**32 - 1))
    key = jax.random.fold_in(key, number)
    return self.sums(ema, frozen, batch["ids"][0], batch["label"][0], key, 0.0, 0.0)[1]


def _load_tokens(path: str, config: MaskGITTrainConfig, fields: dict) -> tokens.TokenSource:
  """Opens tokens and checks that they are the tokenizer's. Raises UserError naming both."""
  source = tokens.TokenSource(path)
  where = config.data.tokenizer
  for key, theirs in (
    ("patch_sizes", list(fields["quantizer"]["patch_sizes"])),
    ("codebook_size", fields["quantizer"]["codebook_size"]),
  ):
    if source.manifest[key] != theirs:
      raise UserError(f"tokens {path} have {key} {source.manifest[key]}, {where} has {theirs}")
  if source.manifest["tokenizer"] != fields["fingerprint"]:
    raise UserError(
      f"tokens {path} were made by tokenizer {source.manifest['tokenizer'][:12]}, "
      f"{where} is {fields['fingerprint'][:12]}"
    )
  return source


class MaskGITTrainer:
  """A `Trainer` (see `training.loop`) of generators. Use it under `jax.set_mesh(mesh)`.

  Raises:
    UserError: the tokens or the tokenizer cannot be read, or do not fit the config or each other.
  """

  shown = ("loss", "accuracy")

  def __init__(self, config: MaskGITTrainConfig, mesh: jax.sharding.Mesh):
    sharding.check_batch("a micro-batch", config.data.batch_size // config.data.accumulation, mesh)
    sharding.check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
    self.config, self.mesh, self.steps = config, mesh, config.steps
    self.images_per_step, self.eval_every = config.data.batch_size, config.eval.every
    fields = weights.read_config(config.data.tokenizer, "tokenizer")
    self.train_tokens = _load_tokens(config.data.train, config, fields)
    self.eval_tokens = _load_tokens(config.data.eval, config, fields) if config.data.eval else None
    self.class_names = self.train_tokens.class_names
    classes = config.model.num_classes or len(self.class_names)
    if config.model.num_classes and classes != len(self.class_names):
      raise UserError(
        f"config.model.num_classes={classes}, but the tokens {config.data.train} have "
        f"{len(self.class_names)} classes"
      )
    if not classes and config.class_dropout < 1:
      raise UserError(
        f"the tokens {config.data.train} have no classes; config.class_dropout=1 trains without"
      )
    if self.eval_tokens and self.eval_tokens.class_names != self.class_names:
      raise UserError(f"{config.data.train} and {config.data.eval} have different classes")
    m, q = config.model, fields["quantizer"]
    self.model_config = MaskGITConfig(
      width=m.width,
      depth=m.depth,
      heads=m.heads,
      num_classes=classes,
      patch_sizes=tuple(q["patch_sizes"]),
      codebook_size=q["codebook_size"],
      code_dim=q["code_dim"],
      embedding=m.embedding,
      mlp_ratio=m.mlp_ratio,
      attention=m.attention,
    )
    self._model, arrays = take_apart(self._initial_model())
    steps_per_epoch = max(1, len(self.train_tokens) // config.data.batch_size)
    self._pure = MaskGITUpdate(config, self.model_config, self._model, steps_per_epoch)
    params, frozen = part(arrays, self._model.select(TRAINED))
    self._initial = jax.tree.map(np.asarray, params)
    self._frozen = jax.device_put(frozen, self._shardings(frozen))
    state = jax.eval_shape(self._pure.fresh_state, self._initial)
    self._state_shardings = self._shardings(state)
    self._abstract = checkpoints.abstract(state, self._state_shardings)
    rest = self._shardings(self._frozen), sharding.batch_sharding(mesh, leading=1)
    self._step = jax.jit(
      self._pure.update,
      donate_argnums=0,
      in_shardings=(self._state_shardings, *rest),
      out_shardings=(self._state_shardings, sharding.replicated(mesh)),
    )
    self._evaluate = jax.jit(
      self._pure.eval_sums,
      in_shardings=(self._state_shardings.ema, *rest, None),
      out_shardings=sharding.replicated(mesh),
    )

  def _shardings(self, tree):
    return sharding.tree_shardings(tree, self.mesh, self.config.mesh.rules)

  def _initial_model(self) -> MaskGIT:
    """A fresh model with the tokenizer's code values."""
    tokenizer = weights.load_tokenizer(self.config.data.tokenizer)
    values = nnx.jit(lambda q: q.values())(tokenizer.quantizer)
    dtype, remat = jnp.dtype(self.config.dtype), self.config.remat

    def make(key, values):
      return MaskGIT(self.model_config, codes=values, dtype=dtype, remat=remat, rngs=nnx.Rngs(key))

    return nnx.jit(make)(jax.random.key(self.config.seed), values)

  def initial_state(self) -> GeneratorState:
    """Fresh weights."""
    params = jax.device_put(self._initial, self._state_shardings.params)
    return jax.jit(self._pure.fresh_state, out_shardings=self._state_shardings)(params)

  def abstract_state(self) -> GeneratorState:
    """Shapes, types and shardings of the state."""
    return self._abstract

  def overview(self, state: GeneratorState) -> str:
    """What trains and what does not."""
    return parameter_overview({"trained": state.params, "frozen codes": self._frozen})

  # One update.

  def step(self, state: GeneratorState, batch) -> tuple[GeneratorState, dict[str, jax.Array]]:
    """One update from {"ids": [accumulation, B, N], "label": [accumulation, B]}."""
    return self._step(state, self._frozen, batch)

  # Data, evaluation, export.

  def batches(self, step: int) -> "_GlobalTokens":
    """Batches for the updates from `step` on."""
    data = self.config.data
    return self._batches(self.train_tokens, data.batch_size, data.accumulation, step)

  def _batches(self, source, batch_size: int, accumulation: int, step: int) -> "_GlobalTokens":
    local = tokens.TokenBatches(
      source,
      batch_size=batch_size,
      seed=self.config.seed,
      start=step * batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    return _GlobalTokens(local, accumulation, sharding.batch_sharding(self.mesh, leading=1))

  def evaluate(self, state: GeneratorState) -> dict[str, Any]:
    """Losses (without smoothing) and accuracy of the averaged weights on held-out tokens.

    Whole batches: of a set that they do not divide, the first images of the next pass fill up.
    """
    if self.eval_tokens is None:
      return {}
    size = self.config.eval.batch_size
    images = min(self.config.eval.images or len(self.eval_tokens), len(self.eval_tokens))
    batches = self._batches(self.eval_tokens, size, 1, 0)
    total = 0
    for i in range(-(-images // size)):
      sums = self._evaluate(state.ema, self._frozen, next(batches), np.uint32(i))
      total += np.asarray(sums, np.float64)
    batches.close()
    count, loss, correct = total
    seen = np.maximum(count, 1)
    return {
      "loss": float(loss.sum() / count.sum()),
      "accuracy": float(correct.sum() / count.sum()),
    } | {
      f"{name}/level_{i}": float(x)
      for name, values in (("level_loss", loss / seen), ("level_accuracy", correct / seen))
      for i, x in enumerate(values, 1)
    }

  def export(self, state: GeneratorState, workdir: pathlib.Path) -> None:
    """Writes the generator with the averaged weights to `workdir`/generator."""
    gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))
    arrays = gather((state.ema, self._frozen))
    if jax.process_index() == 0:
      model = self._model.module(*arrays)
      weights.save_generator(
        model,
        self.config.data.tokenizer,
        workdir / "generator",
        self.class_names,
        self.config.masking.order,
      )


class _GlobalTokens:
  """Iterator over global batches, split into micro-batches."""

  def __init__(self, local: tokens.TokenBatches, accumulation: int, placement):
    self._local, self._accumulation, self._placement = local, accumulation, placement

  def __next__(self) -> dict[str, jax.Array]:
    batch = next(self._local)
    return {
      k: sharding.to_global(
        x.reshape(self._accumulation, -1, *x.shape[1:]), self._placement, axis=1
      )
      for k, x in batch.items()
    }

  def close(self) -> None:
    self._local.close()
