"""The update of a tokenizer at the paper's settings, with random weights, and its parts."""

import dataclasses
import importlib
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from coda_jax import arrays, sharding, weights
from coda_jax import config as c
from coda_jax.losses.reconstruction import reconstruction_loss
from coda_jax.models.dino import DINO
from coda_jax.models.lpips import LPIPS
from coda_jax.models.vae import FLUX_VAE, MAR_VAE, AutoencoderKL
from coda_jax.training.tokenizer_trainer import TokenizerTrainer

CASES = {"mar": ("mar", MAR_VAE), "mar_last": ("mar", MAR_VAE), "flux": ("flux", FLUX_VAE)}


def _random_arrays(make) -> dict[str, np.ndarray]:
  """Random weights that keep activations near 1; norms are the identity."""
  rng, out = np.random.default_rng(0), {}
  for name, shape in weights.expected_shapes(make).items():
    x = rng.standard_normal(shape, np.float32)
    if name.endswith("bias"):
      x *= 0.01
    elif name.endswith("scale"):
      x = np.ones_like(x)
    elif "heads." in name:  # of LPIPS, which are not negative
      x = np.abs(x) / 10
    else:
      x *= np.float32(1.5 / max(1, x.size // shape[-1]) ** 0.5)
    out[name] = x
  return out


def make_trainer(case: str, **changes) -> TokenizerTrainer:
  """The trainer of a case with batches of one image, on one device.

  Args:
    case: one of `CASES`; `mar_last` compares gradients at the decoder's last adapter.
    changes: to the config's settings.
  """
  name, vae = CASES[case]
  settings = c.freeze(c.TrainConfig, importlib.import_module(f"configs.{name}").get_config())
  layer = "last" if case.endswith("_last") else settings.adversarial.adaptive_layer
  with tempfile.TemporaryDirectory() as folder:

    def write(kind, fields, make):
      path = pathlib.Path(folder, kind)
      weights.write_directory(path, kind, fields, _random_arrays(make))
      return str(path)

    make_vae = lambda: AutoencoderKL(vae, rngs=nnx.Rngs(0))
    vae_path = write("vae", {"vae": dataclasses.asdict(vae)}, make_vae)
    dino, lpips = write("dino", {}, DINO), write("lpips", {}, LPIPS)
    settings = dataclasses.replace(
      settings,
      tokenizer=dataclasses.replace(settings.tokenizer, vae=vae_path),
      data=c.DataSettings(train="embedded@train", eval="embedded@val", batch_size=1),
      steps=1000,
      adversarial=dataclasses.replace(
        settings.adversarial, dino_weights=dino, adaptive_layer=layer
      ),
      losses=dataclasses.replace(settings.losses, perceptual_weights=lpips),
      eval=dataclasses.replace(settings.eval, batch_size=1),
      **changes,
    )
    return TokenizerTrainer(settings, sharding.make_mesh(settings.mesh, jax.devices()[:1]))


def parts(trainer: TokenizerTrainer, state, images: int) -> dict[str, tuple[Callable, tuple]]:
  """The networks of an update as {name: (function, arguments)}; see `tokenizer_step`.

  An update needs the gradients of each function for its first argument.

  Args:
    state: the trainer's, which may be shapes alone. Images and activations always are.
    images: size of the batch.
  """
  networks, frozen, heads = trainer._networks, trainer._frozen, state.discriminator
  tokenizer = frozen["tokenizer"] | state.params
  discriminator = frozen["discriminator"] | heads.variables | heads.params
  size, vae = trainer.config.tokenizer.image_size, trainer.tokenizer_config.vae
  latents = (images, *vae.latent_size(size, size), vae.z_channels)
  image, noise = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((images, size, size, 3), latents))

  def head(params, tokenizer, image, noise):
    model = arrays.merge(networks.tokenizer, tokenizer, params)
    latents = model.vae.scale_latents(model.vae.encode(image).sample(noise=noise))
    quantized = model.quantizer(latents)
    z = model.vae.decoder_input(model.vae.unscale_latents(quantized.latents))
    hidden = model.vae.decoder(z, stop=networks.cut)
    return hidden, quantized.vq_loss, quantized.entropy_loss

  def tail(params_and_hidden, tokenizer):
    params, hidden = params_and_hidden
    model = arrays.merge(networks.tokenizer, tokenizer, params)
    return model.vae.decoder(hidden, start=networks.cut).astype(jnp.float32)

  def nll(reconstruction, image, lpips):
    lpips = arrays.merge(networks.lpips, lpips)
    return reconstruction_loss(reconstruction, image, networks.losses, lpips)[0]

  def dino(image, discriminator):
    model = arrays.merge(networks.adversary.graphdef, discriminator)
    return model.features(image, jax.random.key(0))

  def logits(params, features, discriminator):
    model = arrays.merge(networks.adversary.graphdef, discriminator, params)
    return model.logits(features, train=True)

  in_tail = lambda wanted: {k: x for k, x in state.params.items() if (k in networks.tail) == wanted}
  head_args = in_tail(False), tokenizer, image, noise
  hidden = jax.eval_shape(head, *head_args)[0]
  features = jax.eval_shape(dino, image, discriminator)
  return {
    "head": (head, head_args),
    "tail": (tail, ((in_tail(True), hidden), tokenizer)),
    "nll": (nll, (image, image, frozen["lpips"])),
    "DINO": (dino, (image, discriminator)),
    "heads, to features": (
      lambda f, p, d: logits(p, f, d),
      (features, heads.params, discriminator),
    ),
    "heads, to parameters": (logits, (heads.params, features, discriminator)),
  }


def gradient(function: Callable) -> Callable:
  """The gradient for the first argument, where every output has a cotangent."""

  def total(*args):
    out = jax.tree.leaves(function(*args))
    return sum(jnp.square(y.astype(jnp.float32)).mean() for y in out)

  return jax.grad(total)
