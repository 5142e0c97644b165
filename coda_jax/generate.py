"""`python -m coda_jax.generate`: images of classes or prompts, and edits of an image.

Writes `images/NUMBER_CLASS.png` (or `NUMBER_PROMPT.png`), `grid.png` and `settings.json`; on
request the samples as ADM's evaluation reads them (`samples.npz`, key `arr_0`) and a filmstrip of
the steps.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import jax
import numpy as np
import tqdm
from jaxtyping import PRNGKeyArray
from PIL import Image

from coda_jax import cli, storage, weights
from coda_jax.data import decode
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation import sample_figures
from coda_jax.evaluation.image_files import ImageFileWriter
from coda_jax.evaluation.sampling import Make, sample_batches
from coda_jax.generation import editing, options
from coda_jax.generation.generator import Generator, load_generator
from coda_jax.outputs import check_output, written_aside

_LONGEST = 60  # characters of a prompt in a file's name
_MOVED = ("--evaluate", "--sweep", "--real", "--lpips")  # to coda_jax.eval


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.generate",
    description="Generates images of classes or prompts.",
    epilog="example: python -m coda_jax.generate --model runs/maskgit/generator --classes 207,360"
    " --steps 8 --output samples",
  )
  p.add_argument("--model", required=True, metavar="DIR", type=cli.path, help="the generator")
  options.add_wanted(p)
  p.add_argument("--output", required=True, metavar="DIR", type=cli.path, help="new directory")
  p.add_argument("--overwrite", action="store_true", help="replace what the output directory holds")
  p.add_argument(
    "--seed", type=cli.integer(0, 2**32 - 1), default=0, help="of all random numbers (0)"
  )
  p.add_argument(
    "--batch-size", type=cli.integer(1), default=8, metavar="N", help="images at a time (8)"
  )
  p.add_argument("--npz", action="store_true", help="write samples.npz too (arr_0, uint8)")
  p.add_argument("--filmstrip", action="store_true", help="write filmstrip.png, step by step")

  options.add_sampling(p)

  e = p.add_argument_group("editing, instead of new images")
  source = e.add_mutually_exclusive_group()
  source.add_argument(
    "--inpaint", metavar="IMAGE", type=cli.path, help="make the part of --mask anew"
  )
  source.add_argument(
    "--change-class", metavar="IMAGE", type=cli.path, help="make all but the coarsest levels anew"
  )
  e.add_argument(
    "--mask",
    metavar="FILE|BOX",
    help="white changes, or left,top,right,bottom in pixels of the generated image",
  )
  e.add_argument("--outside", action="store_true", help="outpainting: change what is not in --mask")
  e.add_argument(
    "--least",
    type=cli.number(0, 1),
    default=0.0,
    metavar="A",
    help="part of a token's area in the mask (0)",
  )
  e.add_argument("--no-paste", action="store_true", help="do not put back the pixels outside")
  e.add_argument(
    "--keep-levels", type=cli.integer(0), default=1, metavar="K", help="of --change-class (1)"
  )

  for option in _MOVED:
    p.add_argument(option, help=argparse.SUPPRESS)
  return p


def run(args: argparse.Namespace) -> None:
  """Writes the images; see the module's docstring."""
  _check_usage(args)
  settings = options.settings_of(args)
  read = [args.model, args.inpaint, args.change_class, args.mask, args.prompts, args.text_encoder]
  check_output(args.output, "generate", overwrite=args.overwrite, inputs=read)
  generator = load_generator(args.model, text_encoder=args.text_encoder)
  if args.order is None:
    settings = dataclasses.replace(settings, order=generator.order)
  settings.check(generator.config.tokens)
  each = options.wanted_of(args, generator)
  wanted = [x for x in each for _ in range(args.count)]
  key = jax.random.key(args.seed)
  make = _maker(args, generator, key)

  with written_aside(args.output, "generate") as folder:
    written = {
      "model": os.fspath(args.model),
      "fingerprint": weights.fingerprint_of(args.model, "generator"),
      "sampler": dataclasses.asdict(settings),
      "seed": args.seed,
      **options.described(args, generator, each),
      "count": args.count,
      "batch_size": args.batch_size,
      "edit": _edit_settings(args),
    }
    _write_json(folder / "settings.json", written)
    labels = [generator.label(x) for x in wanted]
    batches = sample_batches(make, wanted, settings, args.batch_size)
    shown = _write_images(folder, args, batches, labels)
    sample_figures.sample_grid(shown, labels, args.count).save(folder / "grid.png")
    if args.filmstrip:
      how = settings, key, args.negative_prompt
      strip = sample_figures.filmstrip(generator, wanted, labels, *how)
      strip.save(folder / "filmstrip.png")
  print(f"{args.output / 'images'}, {args.output / 'grid.png'}")


def _check_usage(args) -> None:
  options.check_wanted(args)
  if bool(args.inpaint) != bool(args.mask):
    raise cli.UsageError("--inpaint and --mask belong together")
  if args.filmstrip and (args.inpaint or args.change_class):
    raise cli.UsageError("--filmstrip shows new images, not edits")
  for option in _MOVED:
    if getattr(args, option[2:]) is not None:
      raise cli.UsageError(
        f"{option} moved: python -m coda_jax.eval --generator {args.model} --data SPEC measures "
        "samples, with --yardsticks and --sweep-steps"
      )


def _maker(args: argparse.Namespace, generator: Generator, key: PRNGKeyArray) -> Make:
  """Makes images anew, or by the edit that `args` describes."""
  path = args.inpaint or args.change_class
  image = normalize(_read(path, generator.image_size)) if path else None
  mask = _mask(args, generator.image_size) if args.inpaint else None

  def make(wanted, first, settings):
    how = {"key": key, "first": first, **dataclasses.asdict(settings)}
    how |= options.asked_for(generator, wanted, args.negative_prompt)
    if image is None:
      return generator.generate(**how)
    images = np.stack([image] * len(wanted))
    if mask is None:
      return generator.change_class(images, keep_levels=args.keep_levels, **how)
    paste = not args.no_paste
    return generator.inpaint(images, mask, least=args.least, paste=paste, **how)

  return make


def _read(path: str | os.PathLike, size: int) -> np.ndarray:
  """The centre square of a file's image, uint8 [size, size, 3]."""
  try:
    image = decode.decode_image(storage.path(path).read_bytes())
    return decode.resize_and_crop(image, size, resize_ratio=1.0)
  except decode.UnreadableImage as e:
    raise UserError(f"{path} cannot be read: {e}") from e


def _mask(args, size: int) -> np.ndarray:
  if re.fullmatch(r"-?\d+(,-?\d+){3}", args.mask):
    mask = editing.box_mask(options.numbers("--mask", args.mask), size)
  else:
    mask = _read(cli.path(args.mask), size).mean(-1) > 127
  return ~mask if args.outside else mask


def _edit_settings(args) -> dict | None:
  if args.inpaint:
    names = ("inpaint", "mask", "outside", "least", "no_paste")
  elif args.change_class:
    names = ("change_class", "keep_levels")
  else:
    return None
  values = {name: getattr(args, name) for name in names}
  return {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in values.items()}


def _write_images(
  folder: pathlib.Path,
  args: argparse.Namespace,
  batches: Iterable[tuple[int, np.ndarray, float]],
  labels: Sequence[str],
) -> dict[int, np.ndarray]:
  """Writes the samples; returns those of the grid by index."""
  (folder / "images").mkdir()
  count, digits = len(labels), len(str(len(labels) - 1))
  wanted = set(sample_figures.grid_indices(count, args.count))
  shown, writer = {}, None
  with tqdm.tqdm(total=count, unit="image", disable=None) as bar:
    for first, images, _ in batches:
      for i, image in enumerate(images, first):
        name = re.sub(r"[^\w.-]+", "_", labels[i])[:_LONGEST]
        Image.fromarray(image).save(folder / "images" / f"{i:0{digits}}_{name}.png")
        if i in wanted:
          shown[i] = image
      if args.npz:
        writer = writer or ImageFileWriter(folder / "samples.npz", count, images.shape[1:3])
        writer.write(first, images)
      bar.update(len(images))
  if writer is not None:
    writer.close()
  return shown


def _write_json(file: pathlib.Path, value) -> None:
  file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
  cli.main(run, parser())
