"""Each look-up against its definition, and a further one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from coda_jax import arrays
from coda_jax.errors import UserError
from coda_jax.models import lookups
from tests import tiny
from tests.models.test_quantizer import ATTENTION, EUCLIDEAN, latents, make

IBQ = dataclasses.replace(ATTENTION, lookup="ibq", entropy_temperature=5.0)
PRODUCT = dataclasses.replace(EUCLIDEAN, lookup="product")


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
@pytest.mark.parametrize("attn_dim", [8, 32])
def test_queries_and_keys_give_the_logits_of_the_paper(norm, attn_dim):
  """Eq. 6 in NumPy, with keys of `attn_dim` channels; up to a number for each query."""
  quantizer = make(dataclasses.replace(ATTENTION, norm=norm, attn_dim=attn_dim))
  x = latents(5)

  def project(x, name):
    linear = getattr(quantizer, f"to_{name}")
    y = np.float64(x) @ np.float64(linear.kernel[...]) + np.float64(linear.bias[...])
    if norm == "none":
      return y
    scale = getattr(quantizer, f"norm_{name}")
    y = y - y.mean(1, keepdims=True) if norm == "layer" else y
    y = y / np.sqrt((y**2).mean(1, keepdims=True) + 1e-5) * np.float64(scale.scale[...])
    return y + np.float64(scale.bias[...]) if norm == "layer" else y

  expected = project(x, "q") @ project(quantizer.codebook[...], "k").T
  logits = np.float64(quantizer.queries(x)) @ np.float64(quantizer.keys()).T
  for y in (expected, logits):
    y -= y.mean(1, keepdims=True)
  np.testing.assert_allclose(logits, expected, atol=1e-6 * np.abs(expected).max())


def test_euclidean_matches_its_definition():
  """One level: nearest code, and the two terms of plain VQ, worked out in NumPy."""
  config = dataclasses.replace(EUCLIDEAN, patch_sizes=(2,), codebook_size=5)
  quantizer, x = make(config), latents(1, 2, 2)
  codes, rows = np.asarray(quantizer.codebook[...]), np.asarray(x).reshape(-1, 16)
  ids = ((rows[:, None] - codes) ** 2).sum(-1).argmin(1)
  out = tiny.quantize(quantizer, x)
  np.testing.assert_array_equal(out.ids[0].ravel(), ids)
  np.testing.assert_allclose(out.latents.reshape(-1, 16), codes[ids], atol=1e-6)
  np.testing.assert_allclose(out.vq_loss, 1.25 * ((rows - codes[ids]) ** 2).mean(), rtol=1e-5)
  assert out.entropy_loss == 0

  def loss(x):
    return (quantizer(x).latents * 3).sum()

  np.testing.assert_allclose(jax.jit(jax.grad(loss))(x), 3.0, rtol=1e-6)  # straight through


@pytest.mark.parametrize("config", [ATTENTION, EUCLIDEAN, IBQ, PRODUCT])
def test_the_likeliest_code_is_the_one_that_is_found(config):
  quantizer = make(config)
  x = latents(9)
  sure = np.asarray(quantizer.confidence(x))
  np.testing.assert_array_equal(sure.argmax(1), quantizer.ids(x, quantizer.codes()))
  if config in (ATTENTION, IBQ):
    np.testing.assert_allclose(sure.sum(1), 1, rtol=1e-5)
  else:
    nearest = np.linalg.norm(x[0] - quantizer.values()[sure[0].argmax()])
    assert -sure[0].max() == pytest.approx(nearest, rel=1e-5)


def test_euclidean_codes_learn_from_the_loss_alone():
  quantizer, x = make(EUCLIDEAN), latents(1, 4, 4)

  def loss(codebook, vq):
    graphdef, state = nnx.split(quantizer)
    state["codebook"] = state["codebook"].replace(codebook)
    out = nnx.merge(graphdef, state)(x)
    return out.vq_loss if vq else out.latents.sum()

  codebook = quantizer.codebook[...]
  gradient = jax.jit(jax.grad(loss), static_argnums=1)
  assert jnp.abs(gradient(codebook, True)).max() > 0
  assert jnp.abs(gradient(codebook, False)).max() == 0


def test_ibq_matches_its_definition():
  """One-hot + softmax − sg(softmax) over all codes, times the codes; three losses and entropies."""
  x, g = latents(6), latents(6, seed=4)
  quantizer = make(IBQ)

  def definition(x, codebook):
    sg = jax.lax.stop_gradient
    logits = jnp.matmul(x, codebook.T, precision="highest")
    p = jax.nn.softmax(logits)
    hard = jax.nn.one_hot(logits.argmax(1), len(codebook))
    z, z_hard = (hard + p - sg(p)) @ codebook, hard @ codebook
    q = jax.nn.softmax(logits / IBQ.entropy_temperature)
    entropy = (
      -jax.scipy.special.xlogy(q, q).sum(1).mean() + (q.mean(0) * jnp.log(q.mean(0) + 1e-5)).sum()
    )
    loss = jnp.square(z - x).mean() + jnp.square(sg(z_hard) - x).mean()
    loss += 0.25 * jnp.square(z_hard - sg(x)).mean()
    return (z * g).sum() + loss + entropy, (logits.argmax(1), loss, entropy)

  def ours(x, codebook):
    found = quantizer.look_up(x, lookups.ProjectedCodes(codebook, codebook))
    total = (found.values * g).sum() + found.vq_loss + found.entropy_loss
    return total, (found.ids, found.vq_loss, found.entropy_loss)

  (expected, parts), (found, same) = (
    jax.jit(jax.grad(f, (0, 1), has_aux=True))(x, quantizer.values()) for f in (definition, ours)
  )
  for a, b in zip((*found, *same), (*expected, *parts), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
  assert (np.abs(found[1]).max(1) > 0).all(), "the gradient reaches every code"


def test_product_finds_the_nearest_code_of_each_part():
  """All pairs of the 8 codes of either half in NumPy; loss and gradients too."""
  quantizer, x = make(PRODUCT), latents(30)
  rows, vectors = np.asarray(quantizer.codebook[...]), np.asarray(x)
  assert rows.shape == (8, 16)
  pairs = np.concatenate([np.tile(rows[:, :8], (8, 1)), np.repeat(rows[:, 8:], 8, 0)], 1)
  np.testing.assert_array_equal(quantizer.values(), pairs)
  ids = ((vectors[:, None] - pairs) ** 2).sum(-1).argmin(1)
  found, pull = jax.vjp(jax.jit(lambda x, c: quantizer.look_up(x, c)[1:4:2]), x, quantizer.codes())
  np.testing.assert_array_equal(quantizer.ids(x, quantizer.codes()), ids)
  np.testing.assert_allclose(found[0], pairs[ids], atol=1e-6)
  np.testing.assert_allclose(found[1], 1.25 * ((vectors - pairs[ids]) ** 2).mean(), rtol=1e-5)
  to_x, to_codes = pull((x, 0.0))
  np.testing.assert_array_equal(to_x, x)  # straight through
  assert not to_codes.any()
  expected = np.zeros_like(rows)
  for part, own in ((slice(8), ids % 8), (slice(8, 16), ids // 8)):
    np.add.at(expected[:, part], own, 2 * (rows[own, part] - vectors[:, part]) / vectors.size)
  np.testing.assert_allclose(pull((0 * x, 1.0))[1], expected, atol=1e-6)


def test_sizes_of_the_product_must_fit():
  for change, message in (
    ({"codebook_size": 60}, "codebook_size is 60.*power of 2, such as 64"),
    ({"product_heads": 3}, "product_heads is 3; it must divide the 16 channels"),
    ({"product_heads": 0}, "product_heads is 0"),
  ):
    with pytest.raises(UserError, match=message):
      dataclasses.replace(PRODUCT, **change)


def test_rotation_trick_matches_its_definition():
  """R as a matrix in NumPy: it turns x's direction to the code's; the gradient is |c|/|x| Rᵀ g."""
  x, values, g = latents(6), latents(6, seed=4), latents(6, seed=5)
  x = x.at[4].set(0).at[5].set(-2 * values[5])
  out, pull = jax.vjp(jax.jit(lookups.rotated), x, values)
  np.testing.assert_allclose(out, values, atol=1e-6)
  to_x, to_values = pull(g)
  assert not to_values.any()
  for n in range(4):
    a, b = np.float64(x[n]), np.float64(values[n])
    scale = np.linalg.norm(b) / np.linalg.norm(a)
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    r = (a + b) / np.linalg.norm(a + b)
    rotation = np.eye(16) - 2 * np.outer(r, r) + 2 * np.outer(b, a)
    np.testing.assert_allclose(rotation @ a, b, atol=1e-12)
    np.testing.assert_allclose(rotation.T @ rotation, np.eye(16), atol=1e-12)
    np.testing.assert_allclose(to_x[n], scale * rotation.T @ np.float64(g[n]), atol=1e-5)
  np.testing.assert_array_equal(to_x[4], g[4])  # no direction
  assert np.linalg.norm(to_x[5]) < 2 * np.linalg.norm(g[5])  # opposite


def test_rotation_changes_gradients_alone():
  x, config = latents(1, 2, 2), dataclasses.replace(EUCLIDEAN, patch_sizes=(2,))
  turned = make(dataclasses.replace(config, gradient="rotation"))
  one, other = tiny.quantize(make(config), x), tiny.quantize(turned, x)
  for a, b in zip(one.ids, other.ids, strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(one.latents, other.latents, atol=1e-5)
  np.testing.assert_allclose(one.vq_loss, other.vq_loss, rtol=1e-5)
  gradient = jax.jit(jax.grad(lambda x: turned.look_up(x, turned.codes()).values.sum()))
  assert jnp.abs(gradient(latents(3)) - 1).max() > 0.1
  for lookup, gradient in (("attention", "rotation"), ("euclidean", "none")):
    with pytest.raises(UserError, match=f"gradient is '{gradient}'; for the {lookup} look-up"):
      dataclasses.replace(EUCLIDEAN, lookup=lookup, gradient=gradient)


class SignLookup(lookups.CodebookLookup):
  """The signs of the first channels are the bits of the id."""

  def values(self):
    return self.codebook[...]

  def codes(self):
    return ()

  def ids(self, x, codes):
    bits = self.config.codebook_size.bit_length() - 1
    return ((x[:, :bits] > 0) * 2 ** jnp.arange(bits)).sum(1).astype(jnp.int32)

  def look_up(self, x, codes):
    ids = self.ids(x, codes)
    return lookups.Found(ids, self.values()[ids], codes, vq_loss=jnp.square(x).mean())


@pytest.mark.slow
def test_a_further_look_up_is_a_class_and_a_line(monkeypatch):
  monkeypatch.setitem(lookups.LOOKUPS, "sign", SignLookup)
  config = dataclasses.replace(ATTENTION, lookup="sign")
  assert config.lookup_class is SignLookup and not config.lookup_class.in_official_code
  quantizer, x = make(config), latents(1, 4, 4)
  assert isinstance(quantizer, SignLookup) and list(arrays.of(quantizer)) == ["codebook"]
  out = tiny.quantize(quantizer, x)
  for a, b in zip(out.ids, quantizer.encode(x), strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(quantizer.decode(out.ids), out.latents, atol=1e-5)
  assert out.vq_loss > 0 and out.entropy_loss == 0


def test_parameters_lie_directly_below_the_quantizer():
  """Saved directories and checkpoints have these keys."""
  projections = [f"to_{x}.{y}" for x in "kqv" for y in ("bias", "kernel")]
  for norm, entries in (("none", ()), ("rms", ("scale",)), ("layer", ("bias", "scale"))):
    quantizer = make(dataclasses.replace(ATTENTION, norm=norm))
    norms = [f"norm_{x}.{y}" for x in "kq" for y in entries]
    assert list(arrays.of(quantizer)) == ["codebook", *norms, *projections]
  for config in (EUCLIDEAN, PRODUCT, IBQ):
    assert list(arrays.of(make(config))) == ["codebook"]


@pytest.mark.parametrize(("config", "default"), [(ATTENTION, 0.05), (EUCLIDEAN, 0.25)])
@pytest.mark.slow
def test_beta_has_a_default(config, default):
  def loss(beta):
    return tiny.quantize(make(dataclasses.replace(config, beta=beta)), latents(1, 4, 4)).vq_loss

  assert loss(None) == loss(default) != loss(0.5)
