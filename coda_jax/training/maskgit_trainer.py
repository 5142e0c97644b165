"""Trains a MaskGIT on the tokens of a tokenizer (paper, section 4.1)."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct

from coda_jax import arrays, sharding, storage, weights
from coda_jax.arrays import Arrays, Tree
from coda_jax.config import MaskGITTrainConfig
from coda_jax.data import tokens
from coda_jax.data.inventory import Inventory, describe
from coda_jax.errors import UserError
from coda_jax.models.maskgit import MaskGIT, MaskGITConfig
from coda_jax.training.accumulate import over_micro_batches
from coda_jax.training.maskgit_conditions import conditions_of
from coda_jax.training.maskgit_step import bits_of_images, masked_loss
from coda_jax.training.optimizers import averaged, descend, ema_decay, make_optimizer
from coda_jax.training.trainer import Stream, Trainer


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

  step: Tree
  params: Tree
  ema: Tree
  optimizer: optax.OptState
  level_loss: Tree
  level_accuracy: Tree


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


class MaskGITTrainer(Trainer[GeneratorState, dict[str, jax.Array]]):
  """Trains a generator; see `Trainer`. Code values and text encoder do not train.

  Raises:
    UserError: the tokens or the tokenizer cannot be read, or do not fit the config or each other.
  """

  shown = ("loss", "accuracy")
  product = "generator"

  def __init__(self, config: MaskGITTrainConfig, mesh: jax.sharding.Mesh):
    super().__init__(config, mesh)
    fields = weights.read_config(config.data.tokenizer, "tokenizer")
    self.train_tokens = _load_tokens(config.data.train, config, fields)
    self.eval_tokens = _load_tokens(config.data.eval, config, fields) if config.data.eval else None
    self.conditions = conditions_of(config, self.train_tokens, self.eval_tokens)
    self.steps = config.steps
    self.steps_per_epoch = max(1, len(self.train_tokens) // config.data.batch_size)
    self._optimizer, self.learning_rate = make_optimizer(config.optimizer, self.steps)
    m, q = config.model, fields["quantizer"]
    self.model_config = MaskGITConfig(
      width=m.width,
      depth=m.depth,
      heads=m.heads,
      num_classes=self.conditions.num_classes,
      patch_sizes=tuple(q["patch_sizes"]),
      codebook_size=q["codebook_size"],
      code_dim=q["code_dim"],
      embedding=m.embedding,
      mlp_ratio=m.mlp_ratio,
      attention=m.attention,
      level_codes=tuple(q.get("level_codes", ())),
      text=self.conditions.text,
      factor_codes=tuple(q.get("factor_codes", ())) if m.embedding == "factors" else (),
    )
    model = nnx.eval_shape(lambda: self._make_model(jax.random.key(0)))
    self._model, *_ = arrays.split(model, nnx.Param, ...)
    frozen = dict(self.conditions.fixed)
    if m.embedding == "codes":
      tokenizer = weights.load_tokenizer(config.data.tokenizer)
      values = arrays.jit_module(lambda quantizer: quantizer.embedding_values())(
        tokenizer.quantizer
      )
      frozen["embedding.codes"] = values()
    groups = {"codes": frozen}
    if self.conditions.encoder:
      groups["text_encoder"] = self.conditions.encoder
    self._set_up(groups, {})
    self._evaluate = jax.jit(self._eval_sums, out_shardings=sharding.replicated(mesh))

  def _make_model(self, key: jax.Array) -> MaskGIT:
    """A fresh model, with zeros for the code values; traceable."""
    dtype, remat = jnp.dtype(self.config.dtype), self.config.remat
    return MaskGIT(self.model_config, dtype=dtype, remat=remat, rngs=nnx.Rngs(key))

  def _fresh_state(self, key: jax.Array, given: Arrays) -> GeneratorState:
    del given
    params = arrays.of(self._make_model(key), nnx.Param)
    levels = len(self.model_config.patch_sizes)
    return GeneratorState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema=jax.tree.map(jnp.copy, params),  # donated buffers must not be shared
      optimizer=self._optimizer.init(params),
      level_loss=jnp.full(levels, math.log(self.model_config.codebook_size), jnp.float32),
      level_accuracy=jnp.zeros(levels),
    )

  # One update.

  def _update(self, state: GeneratorState, frozen, key: jax.Array, batch: dict[str, jax.Array]):
    """From {"ids": [accumulation, B, N], "condition": [accumulation, B, ...]}."""
    config = self.config

    def micro_batch(carry, i, batch):
      condition = self._condition(frozen, batch["condition"])

      def loss(params):
        return masked_loss(
          arrays.merge(self._model, frozen["codes"], params),
          batch["ids"],
          condition,
          jax.random.fold_in(key, i),
          config.masking,
          label_smoothing=config.label_smoothing,
          class_dropout=config.class_dropout,
        )

      return carry, *jax.grad(loss, has_aux=True)(state.params)

    _, gradients, (count, loss, correct) = over_micro_batches(micro_batch, (), batch)
    params, optimizer = descend(self._optimizer, gradients, state.optimizer, state.params)
    ema = averaged(state.ema, params, ema_decay(config.ema, state.step, self.steps_per_epoch))
    seen = jnp.maximum(count, 1)
    level_loss = jnp.where(count > 0, loss / seen, state.level_loss)
    level_accuracy = jnp.where(count > 0, correct / seen, state.level_accuracy)
    metrics = {
      "loss": loss.sum() / count.sum(),
      "accuracy": correct.sum() / count.sum(),
      "level_loss": level_loss,
      "level_accuracy": level_accuracy,
      "masked": count.sum() / batch["ids"].size,
      "grad_norm": optax.tree.norm(gradients),
      "learning_rate": self.learning_rate(state.step),
    }
    new = GeneratorState(state.step + 1, params, ema, optimizer, level_loss, level_accuracy)
    return new, metrics

  def _condition(self, frozen, condition: jax.Array) -> jax.Array:
    """What the model takes, of what a batch holds."""
    return self.conditions.embedded(frozen.get("text_encoder", {}), condition)

  # Data, evaluation, export.

  def inventory(self) -> dict[str, Inventory]:
    """See `Trainer`."""
    sources = {"data.train": self.train_tokens, "data.eval": self.eval_tokens}
    return {key: describe(s, str(s.path)) for key, s in sources.items() if s is not None}

  def _local_batches(self, start: int) -> tokens.TokenBatches:
    return self._batches_of(self.train_tokens, self.config.data.batch_size, start)

  def _batches_of(self, source: tokens.TokenSource, batch_size: int, start: int):
    part, parts = sharding.batch_part(self.mesh)
    return tokens.TokenBatches(
      source,
      batch_size=batch_size,
      seed=self.config.seed,
      start=start,
      process_index=part,
      process_count=parts,
      tokenize=self.conditions.tokenize,
    )

  def _eval_sums(self, ema: Arrays, frozen, key: jax.Array, batch, number):
    """(sums per level [3, levels], sum of the images' bits) of the held-out batch `number`."""
    key = jax.random.fold_in(jax.random.wrap_key_data(key), Stream.EVALUATION)
    model = arrays.merge(self._model, frozen["codes"], ema)
    key = jax.random.fold_in(key, number)
    condition, ids = self._condition(frozen, batch["condition"][0]), batch["ids"][0]
    bits = bits_of_images(model, ids, condition, key, self.config.masking.order)
    return masked_loss(model, ids, condition, key, self.config.masking)[1], bits.sum()

  def metric_names(self) -> list[str]:
    """See `Trainer`."""
    levels = range(1, len(self.model_config.patch_sizes) + 1)
    names = [f"{name}/level_{i}" for name in ("level_loss", "level_accuracy") for i in levels]
    return ["loss", "accuracy", "bits", *names] if self.eval_tokens is not None else []

  def evaluate(self, state: GeneratorState) -> dict[str, float]:
    """Losses (without smoothing), accuracy and bits of the averaged weights on held-out tokens.

    `bits` is of an image; see `maskgit_step.bits_of_images`.
    Whole batches: of a set that they do not divide, the first images of the next pass fill up.
    """
    if self.eval_tokens is None:
      return {}
    size = self.config.eval.batch_size
    images = min(self.config.eval.images or len(self.eval_tokens), len(self.eval_tokens))
    batches = sharding.GlobalBatches(self._batches_of(self.eval_tokens, size, 0), self.mesh)
    total, bits, passes = np.zeros((3, len(self.model_config.patch_sizes))), 0.0, -(-images // size)
    for i in self.checked(range(passes)):
      sums, b = self._evaluate(state.ema, self._frozen, self._key, next(batches), np.uint32(i))
      total += np.asarray(sums, np.float64)
      bits += float(b)
    batches.close()
    count, loss, correct = total
    seen = np.maximum(count, 1)
    return {
      "loss": float(loss.sum() / count.sum()),
      "accuracy": float(correct.sum() / count.sum()),
      "bits": bits / (passes * size),
    } | {
      f"{name}/level_{i}": float(x)
      for name, values in (("level_loss", loss / seen), ("level_accuracy", correct / seen))
      for i, x in enumerate(values, 1)
    }

  def export(self, state: GeneratorState, workdir: storage.Path) -> None:
    """Writes the generator with the averaged weights to `workdir`/generator."""
    ema, codes = sharding.gather((state.ema, self._frozen["codes"]), self.mesh)
    if jax.process_index() == 0:
      weights.save_generator(
        arrays.merge(self._model, codes, ema),
        self.config.data.tokenizer,
        workdir / self.product,
        self.train_tokens.class_names if self.conditions.num_classes else (),
        self.config.masking.order,
        self.origin(state, workdir),
        averaged=True,
        text_encoder=self.conditions.text_encoder,
        text_encoder_dir=self.conditions.text_encoder_dir,
      )
