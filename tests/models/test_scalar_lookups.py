"""FSQ, LFQ and BSQ against their definitions, worked out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import coda_jax
from coda_jax import arrays, weights
from coda_jax.errors import UserError
from coda_jax.models.quantizer import QuantizerConfig, ResidualQuantizer
from coda_jax.models.scalar_lookups import FSQ_LEVELS
from convert.api import to_torch
from tests import tiny
from tests.models.test_quantizer import latents

FSQ = QuantizerConfig(24, (1, 2), lookup="fsq", fsq_levels=(3, 2, 4))
LFQ = QuantizerConfig(32, (1, 2), lookup="lfq", entropy_temperature=0.5)
BSQ = dataclasses.replace(LFQ, lookup="bsq", beta=0.5)
ALL = pytest.mark.parametrize("config", [FSQ, LFQ, BSQ], ids=["fsq", "lfq", "bsq"])

SLOW_LFQ = pytest.mark.parametrize(
  "config", [FSQ, pytest.param(LFQ, marks=pytest.mark.slow), BSQ], ids=["fsq", "lfq", "bsq"]
)


def make(config, **params):
  """A quantizer with random projections, or those that are given."""

  def build():
    return ResidualQuantizer(config, rngs=nnx.Rngs(0))

  return weights.build(build, tiny.random_params(build) | params, "test")


def plain(config, d):
  """A quantizer that takes the first d channels as they are."""
  eye, zeros = np.eye(16, dtype=np.float32), np.zeros(16, np.float32)
  names = {"project_in.kernel": eye[:, :d], "project_out.kernel": eye[:d]}
  return make(config, **names, **{"project_in.bias": zeros[:d], "project_out.bias": zeros})


def numpy(quantizer):
  return {name: np.float64(x) for name, x in arrays.of(quantizer).items()}


@nnx.jit
def look_up(quantizer, x):
  return quantizer.look_up(x, quantizer.codes())


@nnx.jit
def encode(quantizer, x):
  return quantizer.encode(x)


def test_fsq_finds_levels_by_hand():
  """0 is a level whatever their number: the tanh is shifted where it is even."""
  x = jnp.zeros((5, 16)).at[1].set(10).at[2].set(-10).at[3, :3].set(jnp.array([0.5, -1, -0.5]))
  x = x.at[4, :3].set(jnp.array([0.6, 1, 0.5]))
  found = look_up(plain(FSQ, 3), x)
  # Row 3: tanh .5 = .46; .4995 tanh(.56) - .5 = -.25; 1.4985 tanh(-.15) - .5 = -.73.
  # Row 4: tanh .6 = .54; .4995 tanh(2.56) - .5 = -.006; 1.4985 tanh(.85) - .5 = .53.
  digits = np.array([[1, 1, 2], [2, 1, 3], [0, 0, 0], [1, 1, 1], [2, 1, 3]])
  np.testing.assert_array_equal(found.ids, digits @ [1, 3, 6])
  np.testing.assert_allclose(found.values[:, :3], (digits - [1, 1, 2]) / [1, 1, 2], atol=1e-6)
  assert found.vq_loss == found.entropy_loss == 0


def test_fsq_matches_its_definition_with_its_gradient():
  quantizer, x, g = make(FSQ), latents(50), latents(50, seed=4)
  p, levels = numpy(quantizer), np.array(FSQ.fsq_levels)
  half, offset = (levels - 1) * 0.999 / 2, np.where(levels % 2, 0, 0.5)
  inner = np.tanh(
    np.float64(x) @ p["project_in.kernel"] + p["project_in.bias"] + np.tan(offset / half)
  )
  rounded = np.round(inner * half - offset)
  values = rounded / (levels // 2) @ p["project_out.kernel"] + p["project_out.bias"]
  found = look_up(quantizer, x)
  np.testing.assert_array_equal(found.ids, (rounded + levels // 2) @ [1, 3, 6])
  assert len(np.unique(found.ids)) > 10
  np.testing.assert_allclose(found.values, values, atol=1e-5)
  inward = np.float64(g) @ p["project_out.kernel"].T / (levels // 2) * half * (1 - inner**2)
  gradient = jax.jit(jax.grad(lambda x: (quantizer.look_up(x, ()).values * g).sum()))(x)
  np.testing.assert_allclose(gradient, inward @ p["project_in.kernel"].T, atol=1e-5)


def brute_force(config, y):
  """(ids of the nearest codes, all codes, tokens x V probabilities)."""
  d = 5
  size = 1.0 if config is LFQ else d**-0.5
  codes = size * (2 * (np.arange(32)[:, None] >> np.arange(d) & 1) - 1)
  logits = -np.square(y[:, None] - codes).sum(-1) / config.entropy_temperature
  p = np.exp(logits - logits.max(1, keepdims=True))
  p /= p.sum(1, keepdims=True)
  return logits.argmax(1), codes, p


@pytest.mark.parametrize("config", [LFQ, BSQ], ids=["lfq", "bsq"])
def test_bits_match_their_definition(config):
  """Ids are the nearest of all V codes; entropies are those of softmax(-distance²/τ) over them."""
  quantizer, x = make(config), latents(40)
  w = numpy(quantizer)
  y = np.float64(x) @ w["project_in.kernel"] + w["project_in.bias"]
  if config is BSQ:
    y /= np.linalg.norm(y, axis=1, keepdims=True)
  ids, codes, p = brute_force(config, y)
  found = look_up(quantizer, x)
  np.testing.assert_array_equal(found.ids, ids)
  values = codes[ids] @ w["project_out.kernel"] + w["project_out.bias"]
  np.testing.assert_allclose(found.values, values, atol=1e-5)
  beta = 0.25 if config is LFQ else 0.5
  np.testing.assert_allclose(found.vq_loss, beta * np.square(y - codes[ids]).mean(), rtol=1e-5)
  entropy = lambda p: -(p * np.log(p)).sum(-1)
  mean = p.mean(0)
  if config is LFQ:
    codebook = entropy(mean)
  else:  # bit by bit
    bits = np.array([mean[code > 0].sum() for code in codes.T])
    codebook = entropy(np.stack([bits, 1 - bits], 1)).sum()
    assert codebook > entropy(mean) + 0.01
  np.testing.assert_allclose(found.entropy_loss, entropy(p).mean() - codebook, rtol=1e-4)


@pytest.mark.parametrize("config", [LFQ, BSQ], ids=["lfq", "bsq"])
def test_bits_have_the_gradients_of_their_definition(config):
  """By automatic differentiation of the definition, which holds tokens x V probabilities."""
  quantizer, x, g = make(config), latents(40), latents(40, seed=4)
  sizes = {LFQ: 1.0, BSQ: 5**-0.5}
  codes = sizes[config] * (2.0 * (np.arange(32)[:, None] >> np.arange(5) & 1) - 1)
  codes, tau = jnp.float32(codes), config.entropy_temperature

  def ours(x):
    found = quantizer.look_up(x, ())
    return (found.values * g).sum() + found.entropy_loss + found.vq_loss

  def definition(x):
    y = quantizer.project_in(x)
    if config is BSQ:
      y /= jnp.linalg.norm(y, axis=1, keepdims=True)
    squares = jnp.square(y[:, None] - codes).sum(-1)
    p, log_p = jax.nn.softmax(-squares / tau), jax.nn.log_softmax(-squares / tau)
    mean = p.mean(0)
    entropy = -(p * log_p).sum(1).mean() + (mean * jnp.log(mean)).sum()
    if config is BSQ:
      one = mean @ (codes > 0)
      bits = -one * jnp.log(one) - (1 - one) * jnp.log(1 - one)
      entropy = -(p * log_p).sum(1).mean() - bits.sum()
    straight = (y @ quantizer.project_out.kernel[...] * g).sum()
    return straight + entropy + quantizer.beta * jnp.square(y - codes[squares.argmin(1)]).mean()

  one, other = (jax.jit(jax.grad(f))(x) for f in (ours, definition))
  np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


def test_saturated_bits_have_finite_gradients():
  config = dataclasses.replace(LFQ, entropy_temperature=0.01)
  quantizer = plain(config, 5)
  loss = jax.jit(jax.value_and_grad(lambda x: quantizer.look_up(x, ()).entropy_loss))
  for x, expected in ((jnp.full((4, 16), 9.0), 0), (9 * jnp.sign(latents(4)), None)):
    value, gradient = loss(x)
    assert np.isfinite(gradient).all()
    if expected is None:  # some codes, each as often as it comes
      share = np.unique(np.asarray(x[:, :5]), axis=0, return_counts=True)[1] / 4
      expected = (share * np.log(share)).sum()
      assert expected < -1
    np.testing.assert_allclose(value, expected, atol=1e-6)


@ALL
def test_every_id_has_a_value_of_its_own(config):
  quantizer = make(config)
  points = quantizer.all_points()
  np.testing.assert_array_equal(quantizer._join(quantizer.digits(points)), range(len(points)))
  values = np.asarray(quantizer.values())
  assert values.shape == (config.codebook_size, 16) and len(np.unique(values, axis=0)) == len(
    values
  )


@SLOW_LFQ
def test_levels_agree_in_encode_decode_and_call(config):
  quantizer, x = make(config), latents(2, 2, 2)
  names = [f"project_{end}.{x}" for end in ("in", "out") for x in ("bias", "kernel")]
  assert list(arrays.of(quantizer)) == names
  out = tiny.quantize(quantizer, x)
  for a, b in zip(out.ids, encode(quantizer, x), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(quantizer.decode(out.ids), out.latents, atol=1e-5)
  vectors = latents(9)
  likeliest = quantizer.confidence(vectors).argmax(1)
  np.testing.assert_array_equal(likeliest, quantizer.ids(vectors, quantizer.codes()))


@pytest.mark.parametrize("config", [FSQ, BSQ])
@pytest.mark.slow
def test_saved_loaded_and_not_converted(config, tmp_path):
  shape = dataclasses.replace(config, patch_sizes=(1, 8))
  tokenizer = tiny.tokenizer(dataclasses.replace(tiny.TOKENIZER, quantizer=shape, lora=None))
  coda_jax.save_tokenizer(tokenizer, tmp_path / "saved")
  loaded = coda_jax.load_tokenizer(tmp_path / "saved")
  assert loaded.config == tokenizer.config
  np.testing.assert_array_equal(loaded.quantizer.values(), tokenizer.quantizer.values())
  with pytest.raises(UserError, match=f"official code has no {config.lookup} look-up"):
    to_torch(tmp_path / "saved", tmp_path / "torch")


@SLOW_LFQ
def test_values_start_near_vectors(config):
  quantizer, x = ResidualQuantizer(config, rngs=nnx.Rngs(0)), latents(200)
  kept = x @ quantizer.project_in.kernel[...] @ quantizer.project_in.kernel[...].T
  error = jnp.square(look_up(quantizer, x).values - kept).mean() / jnp.square(kept).mean()
  assert error < 0.6


def test_sizes_must_fit():
  def config(lookup, size, *levels):
    return QuantizerConfig(size, (1,), lookup=lookup, fsq_levels=levels)

  for size, levels in FSQ_LEVELS.items():
    assert config("fsq", size).lookup_class.radices(config("fsq", size)) == levels
  for args, message in (
    (("fsq", 1024), r"codebook_size is 1024.*fsq_levels.*240, 1000, 4375, 15360, 64000"),
    (("fsq", 1024, 8, 8, 8), r"fsq_levels is \(8, 8, 8\).*1024"),
    (("fsq", 8, 8, 1), "at least 2"),
    (("lfq", 1000), "codebook_size is 1000; for the lfq look-up it is a power of 2"),
    (("bsq", 1), "codebook_size is 1; for the bsq"),
  ):
    with pytest.raises(UserError, match=message):
      config(*args)
