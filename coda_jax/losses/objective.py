"""The tokenizer's objective and all its gradients (paper, Eq. 9).

  nll   = l1·mean|x − x̂| + mse·mean(x − x̂)² + perceptual·LPIPS(x, x̂)
  g     = −mean D(x̂)
  total = nll + schedule·d·g + quantization·L_q + entropy·L_e
  d     = weight · clip(|∇nll| / (|∇g| + 1e-6), 0, 1e4), gradients at one weight of the decoder

Gradients are linear in their cotangents, so no network runs backward more often than that takes:
the decoder above the weight of d once for nll and once for g, everything below it once for their
sum, LPIPS and the discriminator once each.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from coda_jax.config import AdversarialSettings, LossSettings
from coda_jax.errors import UserError
from coda_jax.functional import Arrays, Functional, arrays_of, part
from coda_jax.losses.adversarial import DISCRIMINATOR_LOSSES, generator_loss
from coda_jax.losses.augmentation import diff_augment, fade_blur
from coda_jax.models.lpips import LPIPS
from coda_jax.ops.recompute import after

Images = Float[Array, "b h w 3"]


def reconstruction_loss(
  reconstruction: Images, images: Images, weights: LossSettings, lpips: LPIPS | None
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
  """nll and its terms, unweighted, by name. `lpips` may be None if its weight is 0."""
  error = reconstruction - images
  terms = {"l1": jnp.abs(error).mean(), "mse": jnp.square(error).mean()}
  nll = weights.l1 * terms["l1"] + weights.mse * terms["mse"]
  if weights.perceptual:
    real = jax.lax.stop_gradient(lpips.features(images))
    terms["lpips"] = lpips.distance(real, lpips.features(reconstruction)).mean()
    nll += weights.perceptual * terms["lpips"]
  return nll, terms | {"nll": nll}


def adaptive_weight(nll_gradient: jax.Array, g_gradient: jax.Array) -> Float[Array, ""]:
  """clip(|∇nll| / (|∇g| + 1e-6), 0, 1e4), Euclidean norms (VQGAN, arXiv 2012.09841, Eq. 7)."""
  norm = lambda x: jnp.linalg.norm(x.astype(jnp.float32).ravel())  # noqa: E731
  return jnp.clip(norm(nll_gradient) / (norm(g_gradient) + 1e-6), 0.0, 1e4)


class Adversary:
  """A discriminator as pure functions of its arrays.

  It judges three times in a micro-batch, each a power iteration and an update of the running
  statistics: the reconstruction for g, then the images and the reconstruction for its own loss.
  What it sees may be drawn anew each time (`AdversarialSettings`); frozen features are computed
  once for each distinct view.

  Args:
    discriminator: structure of a `Discriminator`.
    settings: what it sees and how it learns.
  """

  def __init__(self, discriminator: Functional, settings: AdversarialSettings):
    self.structure, self.settings = discriminator, settings
    self._trained = discriminator.select((("Param", r"^heads\."),))
    self._variable = discriminator.select((("PowerIteration", ""), ("BatchStat", "")))

  def split(self, arrays: Arrays) -> tuple[Arrays, Arrays, Arrays]:
    """(what trains, what every call changes, what is frozen) of the discriminator's arrays."""
    params, rest = part(arrays, self._trained)
    return params, *part(rest, self._variable)

  def _features(self, arrays, images: Images, key: jax.Array, blur: jax.Array):
    """What the heads look at in one view of the images."""
    settings = self.settings
    view, augmentation = jax.random.split(key)
    if settings.blur_fade:
      images = fade_blur(images, blur)
    if settings.augment:
      images = diff_augment(
        images, augmentation, probability=settings.augment, cutout=settings.cutout
      )
    module = self.structure.module(*arrays)
    return module.features(images, view if settings.random_crop else None)

  def _same_view(self, arrays, size: tuple[int, int], a: jax.Array, b: jax.Array):
    """Whether two keys give the same features; a Python bool where that is known beforehand."""
    if self.settings.augment:
      return False
    if not self.settings.random_crop:
      return True
    module = self.structure.module(*arrays)
    return module.same_view(size, jax.random.split(a)[0], jax.random.split(b)[0])

  def _logits(self, params: Arrays, variables: Arrays, frozen: Arrays, features):
    """Logits, and the variables after the call."""
    module = self.structure.module(params, variables, frozen)
    logits = module.logits(features, train=True)
    return logits, part(arrays_of(module), set(variables))[0]

  def generator(
    self,
    params: Arrays,
    variables: Arrays,
    frozen: Arrays,
    reconstruction: Images,
    key: jax.Array,
    blur: jax.Array,
  ):
    """g; its gradients for the reconstruction and for `params`; features; new variables."""

    def g(reconstruction, params):
      features = self._features((params, variables, frozen), reconstruction, key, blur)
      logits, after = self._logits(params, variables, frozen, features)
      return generator_loss(logits), (features, after)

    (loss, (features, after)), gradients = jax.value_and_grad(g, argnums=(0, 1), has_aux=True)(
      reconstruction, params
    )
    return loss, *gradients, features, after

  def own(
    self,
    params: Arrays,
    variables: Arrays,
    frozen: Arrays,
    images: Images,
    reconstruction: Images,
    fake_features,
    keys: tuple[jax.Array, jax.Array, jax.Array],
    blur: jax.Array,
  ):
    """Gradients of the discriminator's loss for `params`; new variables; metrics.

    Args:
      fake_features: those of the reconstruction under `keys[0]`.
      keys: of the views of the reconstruction for g, of the images, of the reconstruction.
    """
    arrays = (params, variables, frozen)
    real = self._features(arrays, images, keys[1], blur)
    same = self._same_view(arrays, images.shape[1:3], keys[0], keys[2])
    again = lambda: self._features(arrays, reconstruction, keys[2], blur)  # noqa: E731
    if same is True:
      fake = fake_features
    elif same is False:
      fake = again()
    else:
      fake = jax.lax.cond(same, lambda: fake_features, again)

    def loss(params):
      real_logits, after = self._logits(params, variables, frozen, real)
      fake_logits, after = self._logits(params, after, frozen, fake)
      value = DISCRIMINATOR_LOSSES[self.settings.loss](real_logits, fake_logits)
      metrics = {
        "disc_loss": value,
        "logits_real": real_logits.mean(),
        "logits_fake": fake_logits.mean(),
        "accuracy_real": jnp.mean(real_logits > 0),
        "accuracy_fake": jnp.mean(fake_logits < 0),
      }
      return value, (after, metrics)

    gradients, (after, metrics) = jax.grad(loss, has_aux=True)(params)
    return gradients, after, metrics


@struct.dataclass
class Outcome:
  """The objective on one micro-batch and its gradients.

  Attributes:
    gradients: {path: gradient of the total} of what trains in the tokenizer.
    discriminator_gradients: the same of the discriminator; {} without one.
    variables: the discriminator's, after its calls; {} without one.
    metrics: scalars and per-level vectors by name.
    ids: int32 [B, ph, pw] per level.
    reconstruction: [B, H, W, 3].
  """

  gradients: Any
  discriminator_gradients: Any
  variables: Any
  metrics: Any
  ids: Any
  reconstruction: Any


class Objective:
  """Structures and settings of everything in Eq. 9; the arrays are arguments.

  Args:
    losses: weights of the terms.
    tokenizer: structure of a `Tokenizer`.
    lpips: structure of an `LPIPS`, needed if its weight is not 0.
    adversary: None leaves the adversarial term out.

  Raises:
    UserError: the adaptive layer does not exist.
  """

  def __init__(
    self,
    losses: LossSettings,
    tokenizer: Functional,
    lpips: Functional | None = None,
    adversary: Adversary | None = None,
  ):
    self._losses, self._tokenizer, self._lpips = losses, tokenizer, lpips
    self._adversary = adversary
    self._cut, self._weight = 0, None
    if adversary is not None:
      layer = adversary.settings.adaptive_layer
      self._cut, self._weight = adaptive_layer(tokenizer, layer)

  def __call__(
    self,
    params: Arrays,
    discriminator: tuple[Arrays, Arrays],
    frozen: dict[str, Arrays],
    images: Images,
    noise: Float[Array, "b p q c"],
    key: jax.Array,
    schedule: Float[Array, ""],
    blur: Float[Array, ""],
  ) -> Outcome:
    """Losses and gradients of one micro-batch.

    Args:
      params: what trains in the tokenizer.
      discriminator: its parameters and variables; empty without one.
      frozen: all other arrays: "tokenizer", "lpips", "discriminator".
      images: in [-1, 1].
      noise: standard normal, of the posterior's sample.
      key: of what the discriminator sees.
      schedule: weight of the adversarial term beside d.
      blur: strength of the fading blur, if it is on.
    """
    losses, adversary = self._losses, self._adversary
    lpips = self._lpips.module(frozen["lpips"]) if models.lpips else None

    def tokenizer(params):
      return self._tokenizer.module(frozen["tokenizer"], params)

    # Three segments: up to the convolution with the weight of d, that one, and the rest.
    def below(params):
      model = tokenizer(params)
      latents = model.vae.scale_latents(model.vae.encode(images).sample(noise=noise))
      out = model.quantizer(latents)
      carry = model.vae.decoder_input(model.vae.unscale_latents(out.latents))
      carry = model.vae.decoder.run(carry, 0, self._cut)
      return (carry, out.vq_loss, out.entropy_loss), (out.ids, out.level_mse)

    def at(params, weight, carry):
      own = {} if weight is None else {self._weight: weight}
      return tokenizer(params | own).vae.decoder.run(carry, self._cut, self._cut + 1)

    def above(params, carry):
      return tokenizer(params).vae.decoder.run(carry, self._cut + 1).astype(jnp.float32)

    weight = None if adversary is None else {**frozen["tokenizer"], **params}[self._weight]
    (carry, vq_loss, entropy_loss), pull_below, (ids, level_mse) = jax.vjp(
      below, params, has_aux=True
    )
    carry, pull_at = jax.vjp(at, params, weight, carry)
    reconstruction, pull_above = jax.vjp(above, params, carry)

    (_, metrics), from_nll = jax.value_and_grad(reconstruction_loss, has_aux=True)(
      reconstruction, images, losses, lpips
    )
    grads_above, cotangent = pull_above(from_nll)
    total = metrics["nll"] + losses.quantization * vq_loss + losses.entropy * entropy_loss
    disc_gradients, disc_variables = {}, {}
    if adversary is not None:
      disc_params, disc_variables = discriminator
      keys = tuple(jax.random.split(key, 3))
      g, from_g, leaked, features, disc_variables = adversary.generator(
        disc_params,
        disc_variables,
        frozen["discriminator"],
        after(cotangent, reconstruction),
        keys[0],
        blur,
      )
      grads_g, cotangent_g = pull_above(from_g)
      d = adversary.settings.weight * adaptive_weight(
        pull_at(cotangent)[1], pull_at(cotangent_g)[1]
      )
      grads_above = _add(grads_above, _scale(schedule * d, grads_g))
      cotangent = _add(cotangent, _scale(schedule * d, cotangent_g))
      total += schedule * d * g
      metrics |= {"g_loss": g, "adaptive_weight": d}

    grads_at, grad_weight, cotangent = pull_at(cotangent)
    if self._weight in params:
      grads_at = grads_at | {self._weight: grad_weight}
    ones = jnp.ones((), jnp.float32)
    (grads_below,) = pull_below((cotangent, losses.quantization * ones, losses.entropy * ones))
    if adversary is not None:
      # Last, when nothing is kept for the tokenizer's backward pass any more.
      disc_params, *seen = after(grads_below, (disc_params, images, reconstruction))
      disc_gradients, disc_variables, disc_metrics = adversary.own(
        disc_params,
        disc_variables,
        frozen["discriminator"],
        *seen,
        features,
        keys,
        blur,
      )
      if adversary.settings.discriminator_gradient == "official":
        disc_gradients = _add(disc_gradients, _scale(schedule * d, leaked))
      metrics |= disc_metrics
    return Outcome(
      gradients=_add(grads_below, _add(grads_at, grads_above)),
      discriminator_gradients=disc_gradients,
      variables=disc_variables,
      metrics={"loss": total}
      | metrics
      | {"vq_loss": vq_loss, "entropy_loss": entropy_loss, "quantization_error": level_mse},
      ids=ids,
      reconstruction=reconstruction,
    )


def adaptive_layer(tokenizer: Functional, layer: str) -> tuple[int, str]:
  """(index of the decoder's step, path of the weight) at which nll and g are compared.

  Args:
    layer: a convolution of the decoder, as `decoder.up.0.block.2.conv2`, or "last", the last one
      with an adapter. The weight is its adapter's `lora_up`, or its kernel if it has none.

  Raises:
    UserError: there is no such convolution (the message lists them).
  """
  decoder = tokenizer.module(dict.fromkeys(tokenizer.names)).vae.decoder
  adapted = {n: f"vae.{n}.lora_up" in tokenizer.names for n, _ in decoder.steps() if n}
  if layer == "last":
    layer = next((n for n in reversed(adapted) if adapted[n]), list(adapted)[-1])
  if layer not in adapted:
    raise UserError(
      f"config.adversarial.adaptive_layer={layer!r} is no convolution of the decoder; use last or "
      f"one of {', '.join(adapted)}"
    )
  weight = "lora_up" if adapted[layer] else "kernel"
  return decoder.step_index(layer), f"vae.{layer}.{weight}"


def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


def _scale(factor: jax.Array, tree):
  return jax.tree.map(lambda x: (factor * x.astype(jnp.float32)).astype(x.dtype), tree)
