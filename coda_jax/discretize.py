"""`python -m coda_jax.discretize`: a discrete tokenizer from a continuous VAE, without training.

Blocks of latents get coordinates in which the squared error is that of the decoded image, and codes
for each; see `coda_jax.discretization`. The result is a tokenizer's directory like any other.
"""

import argparse
import dataclasses
import math

import jax
import numpy as np
import tqdm

from coda_jax import arrays, cli, outputs, weights
from coda_jax.data import pipeline, sources
from coda_jax.discretization.fit import BLOCKS, METHODS, Fitted, fit
from coda_jax.models.tokenizer import TokenizerConfig
from coda_jax.models.transform_quantizer import TransformConfig
from coda_jax.models.vae import AutoencoderKL


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.discretize",
    description="Makes a discrete tokenizer of a continuous VAE, without training.",
    epilog="example: python -m coda_jax.discretize --vae vae --data folder:photos@train"
    " --bits 10880 --output tokenizer",
  )
  p.add_argument("--vae", required=True, metavar="DIR", type=cli.path, help="the continuous VAE")
  p.add_argument("--data", required=True, metavar="SPEC", help="for example folder:PATH@train")
  p.add_argument(
    "--bits", required=True, type=cli.number(1), metavar="N", help="of an image, at most"
  )
  p.add_argument("--output", required=True, metavar="DIR", type=cli.path, help="new directory")
  p.add_argument("--overwrite", action="store_true", help="replace what the output directory holds")
  p.add_argument(
    "--image-size", type=cli.integer(1, 2**15), default=256, metavar="S", help="pixels (256)"
  )
  p.add_argument(
    "--method",
    choices=METHODS,
    default="vq",
    help="how codes are found; coda fits the paper's own quantizer (vq)",
  )
  p.add_argument(
    "--block",
    type=cli.integer(1, 16),
    metavar="B",
    help=f"side of the blocks of latents; by default the best of {', '.join(map(str, BLOCKS))}",
  )
  p.add_argument(
    "--codes",
    type=cli.integer(2, 2**16),
    default=1024,
    metavar="V",
    help="of a token, at most (1024)",
  )
  p.add_argument(
    "--patch-sizes",
    type=cli.SIDES,
    default=(),
    metavar="P,...",
    help="of --method coda, sides of the levels' grids; by default the paper's for these latents",
  )
  p.add_argument(
    "--images", type=cli.integer(2), default=1000, metavar="N", help="random crops (1000)"
  )
  p.add_argument(
    "--gradients",
    type=cli.integer(1),
    default=256,
    metavar="N",
    help="of the crops, how many also go backward through the decoder (256)",
  )
  p.add_argument(
    "--resize-ratio", type=cli.number(1, 100), default=1.125, help="shorter edge / crop"
  )
  p.add_argument(
    "--batch-size", type=cli.integer(1), default=8, metavar="B", help="images at a time (8)"
  )
  return p


def run(args: argparse.Namespace) -> None:
  if args.patch_sizes and args.method != "coda":
    raise cli.UsageError("--patch-sizes is for --method coda; the others have --block")
  if args.block and args.method == "coda":
    raise cli.UsageError("--method coda has no --block; its grids are --patch-sizes")
  read = args.vae, sources.location(args.data)
  outputs.check_output(args.output, "tokenizer", overwrite=args.overwrite, inputs=read)
  vae = weights.load_vae(args.vae)
  side, _ = vae.config.latent_size(args.image_size, args.image_size)
  latents, gradients = _collect(vae, args)
  found = fit(
    latents,
    gradients,
    bits=args.bits,
    codes=args.codes,
    method=args.method,
    block=args.block,
    patch_sizes=args.patch_sizes,
  )
  config = TokenizerConfig(vae.config, found.config, image_size=args.image_size)
  flat = {f"vae.{k}": x for k, x in jax.device_get(arrays.of(vae)).items()}
  flat |= {f"quantizer.{k}": x for k, x in found.parameters.items()}
  made = {
    "made": f"without training, by {args.method} on {len(latents):,} crops of {args.data}",
    "made from": f"VAE `{weights.fingerprint_of(args.vae, 'vae')}`",
  }
  weights.write_directory(args.output, "tokenizer", dataclasses.asdict(config), flat, made=made)
  _tell(found, side)
  print(args.output)


def _collect(vae: AutoencoderKL, args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
  """Scaled latents of random crops, and vector-Jacobian products of some, [N, h, w, C]."""
  encode, both = _latents(vae), _gradients(vae)
  latents, gradients = [], []
  count = min(args.batch_size, args.images)
  batches = pipeline.train_batches(
    args.data,
    image_size=args.image_size,
    batch_size=count,
    seed=0,
    resize_ratio=args.resize_ratio,
    flip=True,
  )
  with batches:
    for i in tqdm.trange(math.ceil(args.images / count), desc="encoding", disable=None):
      images = pipeline.normalize(next(batches)["image"])
      if i * count < args.gradients:
        z, g = both(images, jax.random.key(i))
        gradients.append(np.asarray(g))
      else:
        z = encode(images)
      latents.append(np.asarray(z))
  return np.concatenate(latents)[: args.images], np.concatenate(gradients)


def _encode(vae: AutoencoderKL, images):
  return vae.scale_latents(vae.encode(images).mean)


def _with_gradients(vae: AutoencoderKL, images, key):
  latents = _encode(vae, images)
  made, vjp = jax.vjp(lambda z: vae.decode(vae.unscale_latents(z)), latents)
  return latents, vjp(jax.random.normal(key, made.shape, made.dtype))[0]


_latents, _gradients = arrays.jit_module(_encode), arrays.jit_module(_with_gradients)


def _tell(found: Fitted, side: int) -> None:
  config, codes = found.config, found.config.codes_by_level
  if isinstance(config, TransformConfig):
    sides = ", ".join(f"{b}x{b} {100 * x:.2f}%" for b, x in found.compared.items())
    print(f"blocks of latents, by the error reached: {sides}; taken {config.block}x{config.block}")
    used = " ".join(map(str, config.factor_codes))
    print(f"codes of the directions: {used} of {config.code_dim}")
  print(
    f"{config.bits:,.0f} bits in {config.tokens:,} tokens, {len(codes)} levels of {min(codes)} to"
    f" {max(codes)} codes; {side}x{side} latents"
  )
  db = 10 * math.log10(found.error / found.bound)
  print(
    f"error, weighed by the decoder: {100 * found.error:.2f}% of the variance; the bound for"
    f" Gaussians at these bits: {100 * found.bound:.2f}% ({db:.2f} dB less); of the latents:"
    f" {100 * found.latent_error:.2f}%"
  )


def main(argv=None):
  cli.main(run, parser(), argv)


if __name__ == "__main__":
  main()
