"""The tokenizer's objective and its gradients (paper, Eq. 9).

  nll   = l1·mean|x − x̂| + mse·mean(x − x̂)² + perceptual·LPIPS(x, x̂)
  g     = −mean D(x̂)
  total = nll + schedule·d·g + quantization·L_q + entropy·L_e
  d     = weight · clip(|∇nll| / (|∇g| + 1e-6), 0, 1e4), gradients at one weight of the decoder

d needs the gradients of nll and of g apart, down to its weight. So the network is cut at the layer
of the decoder that holds this weight: the tail, this layer and those above, runs backward once for
nll and once for g; the head runs backward once for their sum. LPIPS and the discriminator run
backward once each.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float

from coda_jax import arrays
from coda_jax.arrays import Arrays
from coda_jax.config import AdversarialSettings, LossSettings
from coda_jax.errors import UserError
from coda_jax.losses.adversarial import DISCRIMINATOR_LOSSES, adaptive_weight, generator_loss
from coda_jax.losses.augmentation import diff_augment, fade_blur
from coda_jax.losses.reconstruction import reconstruction_loss
from coda_jax.models.discriminators import CHANGED, TRAINABLE, Discriminator
from coda_jax.models.lpips import LPIPS
from coda_jax.models.tokenizer import Tokenizer

Images = Float[Array, "b h w 3"]


@struct.dataclass
class Heads:
  """The arrays of a discriminator that an update changes; empty without one.

  Attributes:
    params: those that train, by dotted path.
    variables: power iterations and running statistics, which every call changes.
  """

  params: Arrays
  variables: Arrays


@struct.dataclass
class StepOutput:
  """The objective on one micro-batch and its gradients.

  Attributes:
    gradients: gradient of the total for every array of the tokenizer that trains.
    discriminator_gradients: the discriminator's for every parameter of it; {} without one.
    variables: the discriminator's, after its calls; {} without one.
    metrics: scalars and per-level vectors by name.
    ids: int32 [B, ph, pw] per level.
    reconstruction: [B, H, W, 3].
  """

  gradients: Arrays
  discriminator_gradients: Arrays
  variables: Arrays
  metrics: dict[str, jax.Array]
  ids: list[jax.Array]
  reconstruction: jax.Array


@dataclasses.dataclass(frozen=True)
class Adversary:
  """The discriminator in Eq. 9.

  Attributes:
    graphdef: its structure.
    settings: how it is trained and what it is shown.
    weight: path of the tokenizer's array at which the gradients of nll and g are compared.
  """

  graphdef: nnx.GraphDef
  settings: AdversarialSettings
  weight: str


@dataclasses.dataclass(frozen=True)
class Networks:
  """Structures of the networks in Eq. 9, and how the objective weighs them; see `networks`.

  Attributes:
    tokenizer, lpips: graphdefs; `lpips` is None if nothing uses it.
    adversary: None leaves the adversarial term out.
    losses: weights of the terms.
    cut: the decoder's layer with which the tail starts.
    tail: paths of the arrays in the tail.
  """

  tokenizer: nnx.GraphDef
  lpips: nnx.GraphDef | None
  adversary: Adversary | None
  losses: LossSettings
  cut: str
  tail: frozenset[str]


def networks(
  tokenizer: Tokenizer,
  lpips: LPIPS | None,
  discriminator: Discriminator | None,
  losses: LossSettings,
  adversarial: AdversarialSettings,
) -> Networks:
  """The structures of modules, whose arrays may be shapes alone.

  Raises:
    UserError: the adaptive layer does not exist.
  """
  names = list(arrays.of(tokenizer))
  layers = [name for name, _ in tokenizer.vae.decoder.named_layers()]
  cut, adversary = layers[-1], None
  if discriminator is not None:
    cut, weight = adaptive_layer(names, layers, adversarial.adaptive_layer)
    adversary = Adversary(nnx.graphdef(discriminator), adversarial, weight)
  above = tuple(f"vae.decoder.{layer}." for layer in layers[layers.index(cut) :])
  return Networks(
    tokenizer=nnx.graphdef(tokenizer),
    lpips=None if lpips is None else nnx.graphdef(lpips),
    adversary=adversary,
    losses=losses,
    cut=cut,
    tail=frozenset(name for name in names if name.startswith(above)),
  )


def adaptive_layer(names: list[str], layers: list[str], wanted: str) -> tuple[str, str]:
  """(the decoder's layer, path of the weight in it) at which nll and g are compared.

  Args:
    names: paths of the tokenizer's arrays.
    layers: the decoder's, in the order in which they run.
    wanted: a 3x3 convolution of the decoder, as `decoder.up.0.block.2.conv2`, or "last", the last
      one with an adapter. The weight is its adapter's `lora_up`, or its kernel if it has none.

  Raises:
    UserError: there is no such convolution (the message lists them).
  """
  inside = re.compile(r"vae\.(decoder\.(.*?)\.?(?:conv1|conv2|conv))\.kernel$")
  found = [m for layer in layers for n in names if (m := inside.match(n)) and m[2] == layer]
  adapted = {m[1]: f"vae.{m[1]}.lora_up" in names for m in found}
  if wanted == "last":
    wanted = next((n for n in reversed(adapted) if adapted[n]), list(adapted)[-1])
  if wanted not in adapted:
    raise UserError(
      f"config.adversarial.adaptive_layer={wanted!r} is no convolution of the decoder; use last or "
      f"one of {', '.join(adapted)}"
    )
  layer = next(m[2] for m in found if m[1] == wanted)
  return layer, f"vae.{wanted}.{'lora_up' if adapted[wanted] else 'kernel'}"


def loss_and_gradients(
  networks: Networks,
  params: Arrays,
  heads: Heads,
  frozen: dict[str, Arrays],
  images: Images,
  noise: Float[Array, "b p q c"],
  key: jax.Array,
  schedule: Float[Array, ""],
  blur: Float[Array, ""],
) -> StepOutput:
  """Eq. 9 on one micro-batch, and its gradients.

  Args:
    networks: structures and settings.
    params: the arrays of the tokenizer that train.
    heads: those of the discriminator.
    frozen: all other arrays, by network: "tokenizer", "lpips", "discriminator".
    images: in [-1, 1].
    noise: standard normal, of the posterior's sample.
    key: of the views that the discriminator is shown.
    schedule: weight of the adversarial term beside d.
    blur: strength of the fading blur, if it is on.
  """
  losses, adversary = networks.losses, networks.adversary
  lpips = None
  if losses.perceptual and networks.lpips is not None:
    lpips = arrays.merge(networks.lpips, frozen["lpips"])
  everything = frozen["tokenizer"] | params
  head_params = {name: x for name, x in params.items() if name not in networks.tail}
  tail_params = {name: x for name, x in params.items() if name in networks.tail}
  if adversary is not None:
    tail_params[adversary.weight] = everything[adversary.weight]  # it may be frozen

  def head(head_params):
    model = arrays.merge(networks.tokenizer, everything, head_params)
    latents = model.vae.scale_latents(model.vae.encode(images).sample(noise=noise))
    quantized = model.quantizer(latents)
    z = model.vae.decoder_input(model.vae.unscale_latents(quantized.latents))
    hidden = model.vae.decoder(z, stop=networks.cut)
    return (hidden, quantized.vq_loss, quantized.entropy_loss), quantized

  def tail(tail_params, hidden):
    model = arrays.merge(networks.tokenizer, everything, tail_params)
    return model.vae.decoder(hidden, start=networks.cut).astype(jnp.float32)

  (hidden, vq_loss, entropy_loss), pull_head, quantized = jax.vjp(head, head_params, has_aux=True)
  reconstruction, pull_tail = jax.vjp(tail, tail_params, hidden)

  nll_and_gradient = jax.value_and_grad(reconstruction_loss, has_aux=True)
  (nll, metrics), d_nll = nll_and_gradient(reconstruction, images, losses, lpips)
  pulled = pull_tail(d_nll)
  total = nll + losses.quantization * vq_loss + losses.entropy * entropy_loss

  discriminator_gradients: Arrays = {}
  variables = heads.variables
  if adversary is not None:
    calls = _DiscriminatorCalls(adversary, frozen["discriminator"], key, blur)
    g_and_gradients = jax.value_and_grad(calls.generator_loss, argnums=(0, 1), has_aux=True)
    (g, (fake, variables)), (d_g, leak) = g_and_gradients(reconstruction, heads.params, variables)
    pulled_g = pull_tail(d_g)
    at = adversary.weight
    d = adversary.settings.weight * adaptive_weight(pulled[0][at], pulled_g[0][at])
    pulled = _add_scaled(pulled, schedule * d, pulled_g)
    total += schedule * d * g

    gradient = jax.grad(calls.discriminator_loss, has_aux=True)
    discriminator_gradients, (variables, disc_metrics) = gradient(
      heads.params, variables, images, reconstruction, fake
    )
    if adversary.settings.discriminator_gradient == "official":
      discriminator_gradients = _add_scaled(discriminator_gradients, schedule * d, leak)
    metrics |= {"g_loss": g, "adaptive_weight": d} | disc_metrics

  tail_gradients, d_hidden = pulled
  weights = (jnp.float32(losses.quantization), jnp.float32(losses.entropy))
  (head_gradients,) = pull_head((d_hidden, *weights))
  gradients = head_gradients | tail_gradients
  return StepOutput(
    gradients={name: gradients[name] for name in params},
    discriminator_gradients=discriminator_gradients,
    variables=variables,
    metrics={"loss": total}
    | metrics
    | {
      "vq_loss": vq_loss,
      "entropy_loss": entropy_loss,
      "quantization_error": quantized.level_mse,
    },
    ids=quantized.ids,
    reconstruction=reconstruction,
  )


class _DiscriminatorCalls:
  """The three calls of the discriminator in a micro-batch.

  It judges the reconstruction for g, then the images and the reconstruction for its own loss. Each
  call is a power iteration and an update of the running statistics. Each is shown a view of its
  own (`AdversarialSettings`); frozen features are computed once for each distinct view.
  """

  def __init__(self, adversary: Adversary, frozen: Arrays, key: jax.Array, blur: jax.Array):
    self._graphdef, self._settings = adversary.graphdef, adversary.settings
    self._frozen, self._blur = frozen, blur
    self._keys = [jax.random.split(k) for k in jax.random.split(key, 3)]  # [view, augmentation]

  def _features(self, params: Arrays, variables: Arrays, images: Images, call: int):
    """Frozen features of the view that this call is shown."""
    settings, (view, augmentation) = self._settings, self._keys[call]
    if settings.blur_fade:
      images = fade_blur(images, self._blur)
    if settings.augment:
      probability, cutout = settings.augment, settings.cutout
      images = diff_augment(images, augmentation, probability=probability, cutout=cutout)
    model = arrays.merge(self._graphdef, self._frozen, params, variables)
    return model.features(images, view if settings.random_crop else None)

  def _logits(self, params: Arrays, variables: Arrays, features):
    """Logits, and the variables after the call."""
    model = arrays.merge(self._graphdef, self._frozen, params, variables)
    logits = model.logits(features, train=True)
    return logits, arrays.of(model, CHANGED)

  def generator_loss(self, reconstruction: Images, params: Arrays, variables: Arrays):
    """g; (features of the reconstruction, variables)."""
    fake = self._features(params, variables, reconstruction, 0)
    logits, variables = self._logits(params, variables, fake)
    return generator_loss(logits), (fake, variables)

  def discriminator_loss(
    self, params: Arrays, variables: Arrays, images: Images, reconstruction: Images, fake
  ):
    """The discriminator's own loss; (variables, metrics). `fake` are features of the first call."""
    # The heads alone train: no gradient reaches the features.
    real = self._features(params, variables, images, 1)
    again = functools.partial(self._features, params, variables, reconstruction, 2)
    _, height, width, _ = images.shape
    same = self._same_view(params, variables, (height, width))
    if isinstance(same, bool):
      fake = fake if same else again()
    else:
      fake = jax.lax.cond(same, lambda: fake, again)
    real_logits, variables = self._logits(params, variables, real)
    fake_logits, variables = self._logits(params, variables, fake)
    loss = DISCRIMINATOR_LOSSES[self._settings.loss](real_logits, fake_logits)
    metrics = {
      "disc_loss": loss,
      "logits_real": real_logits.mean(),
      "logits_fake": fake_logits.mean(),
      "accuracy_real": jnp.mean(real_logits > 0),
      "accuracy_fake": jnp.mean(fake_logits < 0),
    }
    return loss, (variables, metrics)

  def _same_view(self, params: Arrays, variables: Arrays, size: tuple[int, int]):
    """Whether the first and the third call see the same; a Python bool if no draw decides."""
    if self._settings.augment:
      return False
    if not self._settings.random_crop:
      return True
    model = arrays.merge(self._graphdef, self._frozen, params, variables)
    return model.same_view(size, self._keys[0][0], self._keys[2][0])


def split_discriminator(discriminator: Discriminator) -> tuple[Heads, Arrays]:
  """(arrays that an update changes, frozen arrays) of a discriminator."""
  _, params, variables, frozen = arrays.split(discriminator, TRAINABLE, CHANGED, ...)
  return Heads(params, variables), frozen


def _add_scaled(a, factor: jax.Array, b):
  """a + factor·b, tree by tree."""
  return jax.tree.map(lambda x, y: x + (factor * y.astype(jnp.float32)).astype(x.dtype), a, b)
