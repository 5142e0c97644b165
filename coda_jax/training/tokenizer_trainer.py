"""Trains a tokenizer: LoRA adapters and a quantizer around a frozen VAE (paper, section 4)."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct

from coda_jax import arrays, pretrained, sharding, storage, weights
from coda_jax.arrays import Arrays, Tree
from coda_jax.config import AdversarialSettings, TrainConfig
from coda_jax.data import pipeline, sources
from coda_jax.data.inventory import Inventory, describe
from coda_jax.errors import UserError
from coda_jax.evaluation.codebook import code_age, count_codes, over_levels
from coda_jax.evaluation.evaluator import evaluate
from coda_jax.evaluation.metrics import Results
from coda_jax.evaluation.reconstruction import Batch, BatchResult, reconstruct_batch
from coda_jax.models.dino import DINO
from coda_jax.models.discriminators import DinoDiscriminator, Discriminator, PatchDiscriminator
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.training.accumulate import over_micro_batches
from coda_jax.training.optimizers import averaged, descend, ema_decay, make_optimizer
from coda_jax.training.tokenizer_step import (
  Heads,
  loss_and_gradients,
  networks,
  split_discriminator,
)
from coda_jax.training.trainer import Stream, Trainer

log = logging.getLogger("coda_jax")
_IDLE = 100  # updates after which an unused code counts as idle


@struct.dataclass
class DiscriminatorState:
  """The part of the state that the discriminator has.

  Attributes:
    params: what trains, by dotted path.
    variables: power iterations and running statistics.
    optimizer: optax state.
  """

  params: Tree
  variables: Tree
  optimizer: optax.OptState


@struct.dataclass
class TrainState:
  """Everything that an update changes; donated to it.

  Attributes:
    step: int32, updates done.
    params: what trains, by dotted path.
    ema: its moving average.
    optimizer: optax state; moments for `params` alone.
    code_age: int32 [V], updates since each code was last used.
    discriminator: empty without one.
  """

  step: Tree
  params: Tree
  ema: Tree
  optimizer: optax.OptState
  code_age: Tree
  discriminator: DiscriminatorState


def make_discriminator(config: TrainConfig, rngs: nnx.Rngs) -> Discriminator | None:
  """The discriminator of the config with fresh heads, and zeros for DINO's weights; traceable.

  Raises:
    UserError: the images are too small for it.
  """
  settings, dtype = config.adversarial, jnp.dtype(config.dtype)
  if settings.discriminator == "none":
    return None
  if settings.discriminator == "dino":
    return DinoDiscriminator(DINO(dtype=dtype), dtype=dtype, rngs=rngs)
  if config.tokenizer.image_size >> settings.patch_layers < 3:
    raise UserError(
      f"config.adversarial.patch_layers={settings.patch_layers} leaves nothing of images of "
      f"{config.tokenizer.image_size} pixels; use fewer"
    )
  return PatchDiscriminator(
    width=settings.patch_width, layers=settings.patch_layers, dtype=dtype, rngs=rngs
  )


def load_frozen_features(settings: AdversarialSettings) -> Arrays:
  """The frozen arrays of the discriminator: DINO's, or none.

  Raises:
    UserError: DINO's weights cannot be read.
  """
  if settings.discriminator == "patch":
    log.info("discriminator: PatchGAN, which is not the paper's")
  if settings.discriminator != "dino":
    return {}
  if not settings.dino_weights:
    raise UserError(
      "config.adversarial.discriminator=dino needs config.adversarial.dino_weights, the directory "
      "of `python -m convert dino`; without them choose patch or none"
    )
  dino = pretrained.load_dino(settings.dino_weights)
  return {f"dino.{path}": x for path, x in arrays.of(dino).items()}


class TokenizerTrainer(Trainer[TrainState, jax.Array]):
  """Trains the adapters and the quantizer; see `Trainer`.

  Raises:
    UserError: the VAE, the data or a frozen network cannot be read, or the config does not fit.
  """

  shown = ("loss", "l1", "mse", "lpips", "vq_loss", "entropy_loss")
  product = "tokenizer"

  @classmethod
  def resolved(cls, config: TrainConfig) -> TrainConfig:
    """With the image size of the tokenizer to start from.

    Without LPIPS weights the perceptual term is left out, with a line that says so.
    """
    if config.tokenizer.start:
      try:
        size = weights.read_tokenizer_config(config.tokenizer.start).image_size
      except UserError as e:
        raise UserError(f"config.tokenizer.start: {e}") from e
      tokenizer = dataclasses.replace(config.tokenizer, image_size=size)
      config = dataclasses.replace(config, tokenizer=tokenizer)
    losses = config.losses
    if not losses.perceptual or losses.perceptual_weights or pretrained.has_lpips_package():
      return config
    log.info("no LPIPS weights (convert them or install coda_jax[perceptual]): its weight is 0")
    return dataclasses.replace(config, losses=dataclasses.replace(losses, perceptual=0.0))

  def __init__(self, config: TrainConfig, mesh: jax.sharding.Mesh):
    super().__init__(config, mesh)
    self.train_images = sources.open_source(config.data.train)
    self.eval_images = sources.open_source(config.data.eval)
    self.steps_per_epoch = max(1, len(self.train_images) // config.data.batch_size)
    self.steps = config.steps or config.epochs * self.steps_per_epoch
    self._optimizer, self.learning_rate = make_optimizer(config.optimizer, self.steps)
    self._disc_optimizer, _ = make_optimizer(config.adversarial.optimizer, self.steps)

    self.tokenizer_config, given = self._start()
    lpips = self._load_lpips()
    key = jax.random.key(0)
    tokenizer = nnx.eval_shape(lambda: self._make_tokenizer(key))
    discriminator = nnx.eval_shape(lambda: make_discriminator(config, nnx.Rngs(key)))
    self._networks = networks(tokenizer, lpips, discriminator, config.losses, config.adversarial)
    self._trained = arrays.matching(config.trainable)
    trained = arrays.of(tokenizer, self._trained)
    if not trained:
      raise UserError(f"config.trainable={config.trainable} matches no parameter: nothing to train")
    frozen = {path: x for path, x in given.items() if path not in trained}
    frozen |= self._fresh_frozen(set(arrays.of(tokenizer)) - set(trained) - set(frozen))
    frozen_by_network = {"tokenizer": frozen}
    if lpips is not None:
      frozen_by_network["lpips"] = arrays.of(lpips)
    if discriminator is not None:
      frozen_by_network["discriminator"] = load_frozen_features(config.adversarial)
    self._set_up(frozen_by_network, {path: x for path, x in given.items() if path in trained})
    batch = sharding.batch_sharding(mesh)
    self._reconstruct = jax.jit(
      self._reconstruct_batch,
      in_shardings=(self._state_shardings.ema, self._shardings(self._frozen), batch),
      out_shardings=batch,
    )

  def _start(self) -> tuple[TokenizerConfig, Arrays]:
    """Shape of the tokenizer, and what it starts with: a VAE's arrays, or those of a tokenizer."""
    t = self.config.tokenizer
    if not t.start:
      vae = weights.load_vae(t.vae)
      return t.shape(vae.config), {f"vae.{path}": x for path, x in arrays.of(vae).items()}
    start = weights.load_tokenizer(t.start)
    log.info("starting from %s: its VAE, quantizer and image size", t.start)
    return t.shape(start.config), arrays.of(start)

  def _load_lpips(self):
    """LPIPS for the loss or for evaluations; None if neither wants it or it is not installed."""
    config, losses = self.config, self.config.losses
    dtype = jnp.dtype(config.dtype)
    if not losses.perceptual and not config.eval.lpips:
      return None
    if losses.perceptual_weights:
      return pretrained.load_lpips(losses.perceptual_weights, dtype=dtype)
    return pretrained.lpips_from_package(dtype=dtype) if pretrained.has_lpips_package() else None

  # The state before the first update.

  def _make_tokenizer(self, key: jax.Array) -> Tokenizer:
    """The tokenizer of the config with fresh weights; traceable."""
    dtype, remat = jnp.dtype(self.config.dtype), self.config.remat == "blocks"
    return Tokenizer(self.tokenizer_config, dtype=dtype, remat=remat, rngs=nnx.Rngs(key))

  def _fresh_frozen(self, names: set[str]) -> Arrays:
    """Arrays that neither train nor come from the VAE, as those of a quantizer that is frozen."""
    if not names:
      return {}

    def draw(key):
      fresh = arrays.of(self._make_tokenizer(key))
      return {name: fresh[name] for name in names}

    return jax.jit(draw)(jax.random.key(self.config.seed))

  def _fresh_state(self, key: jax.Array, given: Arrays) -> TrainState:
    """Fresh adapters, quantizer and heads, but for the arrays that are given."""
    params = arrays.of(self._make_tokenizer(key), self._trained) | given
    heads = Heads({}, {})
    rngs = nnx.Rngs(jax.random.fold_in(key, Stream.DISCRIMINATOR))
    if (discriminator := make_discriminator(self.config, rngs)) is not None:
      heads, _ = split_discriminator(discriminator)
    copy = functools.partial(jax.tree.map, jnp.copy)  # donated buffers must not be shared
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=copy(params),
      ema=copy(params),
      optimizer=self._optimizer.init(params),
      code_age=jnp.zeros(self.tokenizer_config.quantizer.codebook_size, jnp.int32),
      discriminator=DiscriminatorState(
        heads.params, heads.variables, self._disc_optimizer.init(heads.params)
      ),
    )

  def initial_state(self) -> TrainState:
    """Fresh adapters and quantizer; look-ups that ask for it start with latents of a batch."""
    state = super().initial_state()
    codes = "quantizer.codebook"
    lookup = self.tokenizer_config.quantizer.lookup_class
    if lookup.codes_start_as_latents and codes in state.params and codes not in self._given:
      batches = self.batches(0)
      places = self._state_shardings.params[codes], self._state_shardings.ema[codes]
      draw = jax.jit(self._draw_codes, out_shardings=places)
      params, ema = draw(state.params, self._frozen, self._key, next(batches))
      batches.close()
      params, ema = state.params | {codes: params}, state.ema | {codes: ema}
      state = dataclasses.replace(state, params=params, ema=ema)
    return state

  def _draw_codes(self, params: Arrays, frozen, key, images: jax.Array):
    """As many latents as the codebook has rows, all different if the batch has them; twice."""
    tokenizer = arrays.merge(self._networks.tokenizer, frozen["tokenizer"], params)
    key = jax.random.fold_in(jax.random.wrap_key_data(key), Stream.FIRST_CODES)
    latents = jax.lax.map(lambda x: tokenizer.latents(pipeline.normalize(x), key), images)
    latents = latents.reshape(-1, latents.shape[-1])
    size = len(params["quantizer.codebook"])
    codes = jax.random.choice(key, latents, (size,), replace=len(latents) < size)
    return codes, jnp.copy(codes)

  # One update.

  def _update(self, state: TrainState, frozen, key: jax.Array, batch: jax.Array):
    """From images uint8 [accumulation, B, H, W, 3]."""
    config, disc = self.config, state.discriminator
    vae, quantizer = self.tokenizer_config.vae, self.tokenizer_config.quantizer
    schedule = jnp.minimum(state.step / (config.adversarial.ramp_steps or self.steps), 1.0)
    blur = 1.0 - jnp.minimum(state.step / (2 * self.steps), 1.0)

    def micro_batch(variables, i, images):
      noise_key, view_key = jax.random.split(jax.random.fold_in(key, i))
      latent = (len(images), *vae.latent_size(*images.shape[1:3]), vae.z_channels)
      out = loss_and_gradients(
        self._networks,
        state.params,
        Heads(disc.params, variables),
        frozen,
        pipeline.normalize(images),
        jax.random.normal(noise_key, latent),
        view_key,
        schedule,
        blur,
      )
      means = out.gradients, out.discriminator_gradients, out.metrics
      return out.variables, means, count_codes(out.ids, quantizer.ranges)

    variables, (gradients, disc_gradients, metrics), counts = over_micro_batches(
      micro_batch, disc.variables, batch
    )
    params, optimizer = descend(self._optimizer, gradients, state.optimizer, state.params)
    ema = averaged(state.ema, params, ema_decay(config.ema, state.step, self.steps_per_epoch))
    overall = over_levels(counts, quantizer.codebook_size)
    age = code_age(state.code_age, overall)
    metrics |= {
      "grad_norm": optax.tree.norm(gradients),
      "learning_rate": self.learning_rate(state.step),
      "codebook_perplexity": _perplexity(counts),
      "codebook_utilization": jnp.mean(overall > 0),
      "codes_idle": jnp.mean(age >= _IDLE),
      "code_age_max": age.max(),
    }
    if self._networks.adversary is not None:
      metrics["disc_grad_norm"] = optax.tree.norm(disc_gradients)
      disc_params, disc_optimizer = descend(
        self._disc_optimizer, disc_gradients, disc.optimizer, disc.params
      )
      disc = DiscriminatorState(disc_params, variables, disc_optimizer)
    return TrainState(state.step + 1, params, ema, optimizer, age, disc), metrics

  # Data, evaluation, export.

  def inventory(self) -> dict[str, Inventory]:
    """See `Trainer`."""
    data = self.config.data
    return {
      "data.train": describe(self.train_images, data.train),
      "data.eval": describe(self.eval_images, data.eval),
    }

  def _local_batches(self, start: int):
    data = self.config.data
    part, parts = sharding.batch_part(self.mesh)
    return pipeline.train_batches(
      self.train_images,
      image_size=self.config.tokenizer.image_size,
      batch_size=data.batch_size,
      seed=self.config.seed,
      start=start,
      process_index=part,
      process_count=parts,
      workers=data.workers,
      resize_ratio=data.resize_ratio,
      flip=data.flip,
      max_unreadable=data.max_unreadable,
    )

  def _picked(self, batch: dict[str, np.ndarray]) -> np.ndarray:
    return batch["image"]

  def metric_names(self) -> list[str]:
    """See `Trainer`."""
    q, side = self.tokenizer_config.quantizer, self.config.tokenizer.image_size
    zeros = lambda *shape: np.zeros((1, *shape), np.float32)
    black = BatchResult(
      images=zeros(side, side, 3),
      lpips=None if self._networks.lpips is None else zeros(),
      ids=[
        np.full((1, p, p), i, np.int32) for p, (i, _) in zip(q.patch_sizes, q.ranges, strict=True)
      ],
      level_errors=zeros(len(q.patch_sizes)),
      latent_mean=zeros(q.code_dim),
      latent_power=zeros(),
      codebook_size=q.codebook_size,
      level_codes=q.codes_by_level,
    )
    return list(Results.of(Batch(np.zeros((1, side, side, 3), np.uint8), black)).summary())

  def evaluate(self, state: TrainState) -> dict[str, float]:
    """Metrics of the averaged weights on held-out images: posterior mean, centre crops."""
    config = self.config
    part, parts = sharding.batch_part(self.mesh)
    with pipeline.eval_batches(
      self.eval_images,
      image_size=config.tokenizer.image_size,
      batch_size=config.eval.batch_size,
      process_index=part,
      process_count=parts,
      workers=config.data.workers,
      resize_ratio=config.data.resize_ratio,
      limit=config.eval.images or None,
      max_unreadable=config.data.max_unreadable,
    ) as batches:
      function = functools.partial(self._reconstruct, state.ema, self._frozen)
      return evaluate(function, self.checked(batches), mesh=self.mesh).summary()

  def _reconstruct_batch(self, ema: Arrays, frozen, images: jax.Array) -> BatchResult:
    tokenizer = arrays.merge(self._networks.tokenizer, frozen["tokenizer"], ema)
    lpips = self._networks.lpips
    lpips = None if lpips is None else arrays.merge(lpips, frozen["lpips"])
    return reconstruct_batch(tokenizer, pipeline.normalize(images), lpips)

  def export(self, state: TrainState, workdir: storage.Path) -> None:
    """Writes the tokenizer with the averaged weights to `workdir`/tokenizer."""
    ema, frozen = sharding.gather((state.ema, self._frozen["tokenizer"]), self.mesh)
    if jax.process_index() == 0:
      tokenizer = arrays.merge(self._networks.tokenizer, frozen, ema)
      t = self.config.tokenizer
      of = {"started from": t.start} if t.start else {"continuous VAE": t.vae}
      made = of | self.origin(state, workdir)
      weights.save_tokenizer(tokenizer, workdir / self.product, made, averaged=True)


def _perplexity(counts: list[jax.Array]) -> jax.Array:
  """exp of the entropy of each level's counts [L]."""
  entropy = [jax.scipy.special.entr(x / x.sum()).sum() for x in counts]
  return jnp.exp(jnp.stack(entropy))
