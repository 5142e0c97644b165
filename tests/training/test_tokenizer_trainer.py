"""Updates of tiny tokenizers (`runs.py`)."""

import dataclasses
import gc

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from coda_jax import arrays, pretrained, sharding, weights
from coda_jax import config as c
from coda_jax.data import pipeline
from coda_jax.errors import UserError
from coda_jax.models.quantizer import QuantizerConfig
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.models.transform_quantizer import TransformConfig
from coda_jax.training import loop
from coda_jax.training.checkpoints import Checkpoints
from coda_jax.training.logging import read_metrics
from coda_jax.training.tokenizer_step import Heads, loss_and_gradients
from coda_jax.training.tokenizer_trainer import TokenizerTrainer
from tests import tiny
from tests.training import runs

ADVERSARIAL = c.AdversarialSettings(
  discriminator="patch", patch_width=4, patch_layers=1, ramp_steps=2
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("inputs")
  runs.make_inputs(folder)
  return folder


def make_trainer(config, devices=1):
  return TokenizerTrainer(config, sharding.make_mesh(config.mesh, jax.devices()[:devices]))


@pytest.fixture(scope="module")
def trainer(folder):
  return make_trainer(runs.config(folder))


@pytest.fixture(scope="module")
def trainer8(folder):
  """The same run on 8 devices, parameters spread over 2 of them."""
  return make_trainer(runs.config(folder, mesh__fsdp=2), devices=8)


def first_updates(trainer, count=5):
  """(state after the first update, losses) of `count` updates."""
  with jax.set_mesh(trainer.mesh):
    state, batches, losses = trainer.initial_state(), trainer.batches(0), []
    for i in range(count):
      state, metrics = trainer.step(state, next(batches))
      losses.append(float(metrics["loss"]))
      if i == 0:
        first = jax.device_get(state)
    batches.close()
  return first, losses


@pytest.fixture(scope="module")
def updates(trainer):
  return first_updates(trainer)


def first_gradients(state, config):
  """Gradients of the first update, from Adam's first moments (no clipping: the norm is small)."""
  adam = next(s for s in state.optimizer if isinstance(s, optax.ScaleByAdamState))
  return {k: m / (1 - config.optimizer.b1) for k, m in adam.mu.items()}


@pytest.mark.slow
def test_eight_devices_compute_the_same(trainer, trainer8, updates):
  first, losses = updates
  first8, losses8 = first_updates(trainer8)
  ours, theirs = (first_gradients(s, trainer.config) for s in (first, first8))
  largest = max(np.abs(g).max() for g in ours.values())
  assert optax.tree.norm(ours) < trainer.config.optimizer.clip
  for name, gradient in ours.items():
    assert np.abs(gradient - theirs[name]).max() <= 1e-5 * largest, name
  np.testing.assert_allclose(losses8, losses, rtol=1e-4)


def test_only_the_selected_train(trainer, updates):
  state, _ = updates
  names = set(state.params)
  assert "quantizer.codebook" in names
  assert all(n.startswith("quantizer.") or ".lora_" in n for n in names)
  assert len([n for n in names if ".lora_" in n]) == 2 * 12
  sizes = sum(x.size for x in state.params.values())
  moments = sum(x.size for x in jax.tree.leaves(state.optimizer))
  assert moments <= 2 * sizes + 4  # two moments each, and counters


@pytest.mark.parametrize("trainable", [c.TrainConfig.trainable, (("Param", "^vae"),)])
@pytest.mark.slow
def test_nothing_is_held_twice(folder, trainable):
  """What a trainer and its state hold together is the state and the frozen weights, each once."""
  before = jax.live_arrays()
  others = {id(x) for x in before}
  trainer = make_trainer(runs.config(folder, adversarial=ADVERSARIAL, trainable=trainable))
  with jax.set_mesh(trainer.mesh):
    state = jax.block_until_ready(trainer.initial_state())
  gc.collect()
  held = {x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if id(x) not in others}
  ours = sum(x.nbytes for x in jax.tree.leaves((state, trainer._frozen)))
  assert sum(held.values()) <= 1.01 * ours


@pytest.mark.slow
def test_what_is_fresh_may_be_frozen_and_a_given_vae_may_train(folder):
  vae = weights.read_arrays(folder / "vae")
  settings = runs.config(folder, trainable=(("LoRAParam", ""), ("Param", r"vae\.decoder\.conv_")))
  trainer = make_trainer(settings)
  with jax.set_mesh(trainer.mesh):
    state = trainer.initial_state()
  trained = [n for n in state.params if ".lora_" not in n]
  assert trained == [f"vae.decoder.conv_{e}.{p}" for e in ("in", "out") for p in ("bias", "kernel")]
  for name in trained:
    np.testing.assert_array_equal(state.params[name], vae[name.removeprefix("vae.")])
    np.testing.assert_array_equal(state.ema[name], state.params[name])
  assert np.std(trainer._frozen["tokenizer"]["quantizer.codebook"]) > 0


@pytest.mark.slow
def test_run_never_recompiles_and_restores_elsewhere(trainer, trainer8, updates, folder, tmp_path):
  """Training, evaluating, saving and resuming use one compiled update and one evaluation."""
  settings = trainer.config

  def run(steps):
    trainer.steps = steps
    return loop.run(trainer, tmp_path, settings.checkpoint, settings.logging, {})

  assert run(3)
  assert run(6)
  assert trainer._step._cache_size() == 1
  assert trainer._reconstruct._cache_size() == 1
  records = read_metrics(tmp_path)
  losses = [r["loss"] for r in records if r["kind"] == "train"]
  np.testing.assert_array_equal(np.float32(losses[:5]), np.float32(updates[1]))
  evaluation = records[-1]
  assert evaluation["kind"] == "eval" and evaluation["step"] == 6
  assert {"psnr", "ssim", "quantization_error/level_2", "codebook_utilization"} <= set(evaluation)

  checkpoints = Checkpoints(tmp_path / "checkpoints", settings.checkpoint)
  _, one = checkpoints.restore(trainer.abstract_state())
  _, eight = checkpoints.restore(trainer8.abstract_state())
  checkpoints.close()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(eight))
  assert len(eight.params["quantizer.codebook"].devices()) == 8
  spread = eight.params["vae.encoder.mid.block_1.conv1.lora_down"].sharding
  assert spread.spec == jax.sharding.PartitionSpec(None, None, None, "fsdp")

  exported = weights.load_tokenizer(tmp_path / "tokenizer")
  flat = arrays.of(exported)
  for name, average in one.ema.items():
    np.testing.assert_array_equal(flat[name], average)
  images = jnp.zeros((1, 16, 16, 3))
  assert exported.decode(exported.encode(images)).shape == images.shape


@pytest.fixture(scope="module")
def euclidean(folder):
  """Residual VQ without adapters, in two micro-batches."""
  settings = runs.config(folder, data__accumulation=2, tokenizer__lora=None, optimizer__clip=1e9)
  settings = c.variant(settings, "rq")
  return make_trainer(settings)


@pytest.mark.slow
def test_euclidean_codes_start_as_latents(euclidean):
  with jax.set_mesh(euclidean.mesh):
    batches = euclidean.batches(0)
    codes = np.asarray(euclidean.initial_state().params["quantizer.codebook"])
    images = next(batches)
    batches.close()
  tokenizer = weights.load_vae(euclidean.config.tokenizer.vae)
  posterior = tokenizer.encode(images.reshape(-1, 16, 16, 3) / 127.5 - 1)
  deviations = (codes[:, None] - posterior.mean.reshape(1, -1, 16)) / jnp.exp(
    0.5 * posterior.logvar.reshape(1, -1, 16)
  )
  nearest = jnp.sqrt(jnp.square(deviations).mean(-1)).min(1)  # standard deviations away
  assert len(np.unique(codes, axis=0)) == 64
  assert nearest.max() < 2


@pytest.mark.slow
def test_product_codes_start_as_latents(euclidean):
  """As many as the codebook has rows, 8 for 64 codes, spread as those of the Euclidean one."""
  product = make_trainer(c.variant(euclidean.config, "product"))
  starts = []
  for trainer in (product, euclidean):
    with jax.set_mesh(trainer.mesh):
      starts.append(np.asarray(trainer.initial_state().params["quantizer.codebook"]))
  assert [x.shape for x in starts] == [(8, 16), (64, 16)]
  assert len(np.unique(starts[0], axis=0)) == 8
  np.testing.assert_allclose(starts[0].std(), starts[1].std(), rtol=0.5)


@pytest.mark.slow
def test_accumulation_averages_gradients(euclidean):
  with jax.set_mesh(euclidean.mesh):
    state, batches = euclidean.initial_state(), euclidean.batches(0)
    images = pipeline.normalize(next(batches))
    batches.close()
    key = jax.random.fold_in(jax.random.key(euclidean.config.seed), 0)
    run = jax.jit(loss_and_gradients, static_argnums=0)
    heads, zero, parts = Heads({}, {}), jnp.zeros(()), []
    for i, x in enumerate(images):
      noise_key, view_key = jax.random.split(jax.random.fold_in(key, i))
      noise = jax.random.normal(noise_key, (4, 16, 16, 16))
      found = run(
        euclidean._networks, state.params, heads, euclidean._frozen, x, noise, view_key, zero, zero
      )
      parts.append(found.gradients)
  assert len(parts) == 2
  first, _ = first_updates(euclidean, 1)
  gradient = first_gradients(first, euclidean.config)["quantizer.codebook"]
  expected = (parts[0]["quantizer.codebook"] + parts[1]["quantizer.codebook"]) / 2
  np.testing.assert_allclose(gradient, expected, atol=1e-6 * np.abs(expected).max())


@pytest.fixture(scope="module")
def adversarial(folder):
  """A small PatchGAN against the tokenizer, in two micro-batches, on 8 devices."""
  settings = runs.config(folder, adversarial=ADVERSARIAL, data__batch_size=16, data__accumulation=2)
  return make_trainer(settings, devices=8)


@pytest.mark.slow
def test_adversarial_updates(adversarial):
  with jax.set_mesh(adversarial.mesh):
    state, batches = adversarial.initial_state(), adversarial.batches(0)
    before = jax.device_get(state.discriminator)
    records = []
    for _ in range(3):
      state, metrics = adversarial.step(state, next(batches))
      records.append(jax.device_get(metrics))
    batches.close()
    after = jax.device_get(state.discriminator)
  for record in records:
    assert all(np.isfinite(x).all() for x in record.values())
    assert {"g_loss", "adaptive_weight", "disc_loss", "accuracy_real", "disc_grad_norm"} <= set(
      record
    )
  # The ramp is 0 in the first update; the loss of a whole update is a mean of micro-batches.
  first = records[0]
  rest = first["nll"] + first["vq_loss"] + 0.05 * first["entropy_loss"]
  np.testing.assert_allclose(first["loss"], rest, rtol=1e-5)
  kernels = [k for k in before.params if k.endswith(".kernel")]  # biases before a norm stay
  assert kernels and all((after.params[k] != before.params[k]).any() for k in kernels)
  means = [k for k in before.variables if k.endswith(".mean")]
  assert means and all((after.variables[k] != before.variables[k]).any() for k in means)


def test_discriminators_that_cannot_be(folder):
  with pytest.raises(UserError, match="needs config.adversarial.dino_weights"):
    make_trainer(runs.config(folder, adversarial__discriminator="dino"))
  settings = runs.config(folder, adversarial__discriminator="patch")
  with pytest.raises(UserError, match="patch_layers=3 leaves nothing of images of 16 pixels"):
    make_trainer(settings)


def test_ema_follows(trainer, updates):
  """Epoch 0 (of 3 updates) copies, then the first average has decay (3//2 + 1) / (3//2 + 10)."""
  with jax.set_mesh(trainer.mesh):
    state, batches = trainer.initial_state(), trainer.batches(0)
    for _ in range(3):
      state, _ = trainer.step(state, next(batches))
    before = jax.device_get(state)
    after = jax.device_get(trainer.step(state, next(batches))[0])
    batches.close()
  name = "quantizer.codebook"
  np.testing.assert_array_equal(before.ema[name], before.params[name])
  expected = 2 / 11 * before.ema[name] + 9 / 11 * after.params[name]
  np.testing.assert_allclose(after.ema[name], expected, rtol=1e-5, atol=1e-7)


def test_batches_must_divide(folder):
  with pytest.raises(UserError, match="micro-batch is 4 images; the mesh splits it over 8"):
    make_trainer(runs.config(folder, data__accumulation=2), devices=8)
  with pytest.raises(UserError, match="config.eval.batch_size is 4 images"):
    make_trainer(runs.config(folder, eval__batch_size=4), devices=8)


def test_patch_sizes_must_fit(folder):
  quantizer = dataclasses.replace(runs.QUANTIZER, patch_sizes=(1, 8))
  with pytest.raises(UserError, match="patch_sizes ends with 8.*must end with 16"):
    make_trainer(runs.config(folder, tokenizer__quantizer=quantizer))


def test_nothing_to_train(folder):
  with pytest.raises(UserError, match="config.trainable=.* matches no parameter"):
    make_trainer(runs.config(folder, trainable=(("LoRAParam", ""),), tokenizer__lora=None))


def test_start_from_a_tokenizer(folder, tmp_path):
  """Its codes stay while the decoder's adapters train; a second run takes up its adapters."""
  quantizer = TransformConfig(10, (8, 8), 64, (6, 4), (3, 2, 4), (1, 1, 2), block=2)
  make = lambda: Tokenizer(TokenizerConfig(runs.VAE, quantizer, None, 16), rngs=nnx.Rngs(0))
  given = tiny.random_params(make)
  weights.save_tokenizer(weights.build(make, given, "test"), tmp_path / "given")
  trainable = (("LoRAParam", "decoder"),)
  start = {"tokenizer__start": str(tmp_path / "given"), "tokenizer__image_size": 256}
  start["tokenizer__quantizer"] = QuantizerConfig(
    8, (8,), lookup="euclidean", beta=0.5, gradient="rotation"
  )
  config = runs.config(folder, **start, tokenizer__vae="", trainable=trainable)
  trainer = make_trainer(TokenizerTrainer.resolved(config))
  assert {"psnr", "codebook_utilization/level_2"} <= set(trainer.metric_names())
  first, losses = first_updates(trainer, 2)
  assert len(losses) == 2 and all(".decoder." in name for name in first.params)

  trainer.export(first, tmp_path)
  ours = weights.load_tokenizer(tmp_path / "tokenizer")
  quantizer = dataclasses.replace(quantizer, beta=0.5, gradient="rotation")
  assert ours.config == dataclasses.replace(make().config, quantizer=quantizer, lora=runs.LORA)
  for path, value in arrays.of(ours).items():
    if ".lora_" not in path:
      np.testing.assert_array_equal(value, given[path], path)
  # An attention quantizer in the config says nothing of how the start trains.
  assert runs.config(folder).tokenizer.shape(ours.config).quantizer == quantizer
  changes = {"tokenizer__start": str(tmp_path / "tokenizer"), "tokenizer__lora": None}
  again = make_trainer(TokenizerTrainer.resolved(runs.config(folder, **changes)))
  state = again.initial_state()
  for path, value in first.ema.items():
    np.testing.assert_array_equal(state.params[path], value, path)
  assert "quantizer.codebooks.0" in state.params


def test_missing_start(folder):
  with pytest.raises(UserError, match="nowhere"):
    TokenizerTrainer.resolved(runs.config(folder, tokenizer__start="nowhere"))


def test_missing_vae(folder):
  with pytest.raises(UserError, match="nowhere"):
    make_trainer(runs.config(folder, tokenizer__vae="nowhere"))


def test_perceptual_weights(folder, monkeypatch, caplog):
  settings = runs.config(folder, losses__perceptual=1.0)
  monkeypatch.setattr(pretrained, "has_lpips_package", lambda: False)
  with caplog.at_level("INFO", "coda_jax"):
    without = TokenizerTrainer.resolved(settings)
  assert without.losses.perceptual == 0
  assert len(caplog.messages) == 1 and "LPIPS" in caplog.messages[0]
  named = runs.config(folder, losses__perceptual=1.0, losses__perceptual_weights="missing_folder")
  assert TokenizerTrainer.resolved(named) is named
  with pytest.raises(UserError, match="missing_folder"):
    make_trainer(named)


def test_another_seed_compiles_nothing(trainer, folder):
  """The seed is an argument of the first state and of the update, not a constant in them."""
  other = make_trainer(runs.config(folder, seed=1))
  texts = []
  for t in (trainer, other):
    with jax.set_mesh(t.mesh):
      texts.append(jax.jit(t._first_state).lower(t._key, t._given).as_text())
  assert texts[0] == texts[1] and (trainer._key != other._key).any()
