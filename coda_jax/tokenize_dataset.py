"""`python -m coda_jax.tokenize_dataset`: the tokens of an image set, to train a generator on.

The same command continues a run that was stopped or killed: shards are written aside and renamed,
and those that are there are kept, unless an image that could not be read now can be. Any number of
processes, on one machine or on many that share the folder, may run the command at once: each takes
shards that no other one holds, and those of a process that was killed. On a TPU pod, whose chips
start on all hosts together, add `--distributed`.
"""

import argparse
import concurrent.futures
import contextlib
import json
import logging
from collections.abc import Callable

import jax
import numpy as np
import tqdm

from coda_jax import arrays, cli, distributed, outputs, sharding, storage, weights
from coda_jax.data import inventory, pipeline, records, rng, sources, tokens
from coda_jax.data.views import Views
from coda_jax.errors import UserError
from coda_jax.hosts import Hosts
from coda_jax.text import shards as text_shards

log = logging.getLogger("coda_jax")

_SOURCE = "source_fingerprint"  # of the images; older manifests have none
_LEFT_OUT = "unreadable image %s (%s): left out"
_WAIT = 60.0  # seconds for another process to write a manifest
_ORDER = 2  # the version of which images a shard holds; manifests without it are of version 1


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(
    prog="python -m coda_jax.tokenize_dataset",
    description="Writes the tokens of an image set.",
    epilog="example: python -m coda_jax.tokenize_dataset --tokenizer runs/flux/tokenizer"
    " --data folder:imagenet@train --output tokens/flux/train",
  )
  p.add_argument("--tokenizer", required=True, metavar="DIR", type=cli.path)
  p.add_argument("--data", required=True, metavar="SPEC", help="for example folder:PATH@train")
  p.add_argument("--output", required=True, metavar="DIR", type=cli.path)
  p.add_argument("--flip", action="store_true", help="every crop mirrored too")
  crops = p.add_mutually_exclusive_group()
  crops.add_argument(
    "--ten-crop", action="store_true", help="corners and centre, each mirrored too"
  )
  crops.add_argument(
    "--random-crops",
    type=cli.integer(0, 10_000),
    default=0,
    metavar="K",
    help="K random crops each",
  )
  p.add_argument(
    "--resize-ratio", type=cli.number(1, 100), default=1.125, help="shorter edge / crop"
  )
  p.add_argument(
    "--text", choices=("captions", "embeddings"), help="write captions too, or their embeddings"
  )
  p.add_argument(
    "--text-encoder", metavar="DIR", type=cli.path, help="what makes the embeddings of captions"
  )
  p.add_argument(
    "--captions",
    metavar="FILE",
    type=cli.path,
    help="captions of an image folder, COCO's .json, .jsonl or .csv; else what lies beside it",
  )
  p.add_argument(
    "--batch-size", type=cli.integer(1), default=64, metavar="N", help="images at a time"
  )
  p.add_argument(
    "--shards", type=cli.integer(0), default=0, metavar="N", help="files; 0: of 10,000 images"
  )
  p.add_argument(
    "--max-unreadable",
    type=cli.number(0, 1),
    default=pipeline.MAX_UNREADABLE,
    metavar="PART",
    help="part of the images that may be unreadable; one may be, unless it is 0",
  )
  p.add_argument(
    "--seed",
    type=cli.integer(0, 2**32 - 1),
    default=0,
    help="of the images' order and random crops",
  )
  distributed.add_flags(p)
  return p


def run(args: argparse.Namespace) -> None:
  """Writes what is missing of the tokens; see the module's docstring."""
  with distributed.joined(args) as hosts:
    _run(args, hosts)


def _run(args: argparse.Namespace, hosts: Hosts | None) -> None:
  source = sources.open_source(args.data)
  found = inventory.describe(source, args.data)
  found.log("--data")
  if hosts is not None:
    hosts.check_same_data({"--data": found})
    hosts.check_shared(args.output, "--output", wait=_WAIT)  # else each writes all of the shards
  fields = weights.read_config(args.tokenizer, "tokenizer")
  given = (args.text_encoder, args.captions)
  texts = text_shards.open_texts(source, args.data, args.text, *given, args.batch_size)
  options = (args.resize_ratio, args.ten_crop, args.random_crops, args.flip, args.seed)
  views = Views(fields["image_size"], *options)
  images = len(source) * len(views)
  shards = min(len(source), args.shards or -(-images // 10_000))
  manifest = {
    "format": tokens.FORMAT,
    "complete": False,
    "tokenizer": fields["fingerprint"],
    "patch_sizes": list(fields["quantizer"]["patch_sizes"]),
    "codebook_size": fields["quantizer"]["codebook_size"],
    "image_size": fields["image_size"],
    "data": args.data,
    _SOURCE: found.fingerprint,
    "source_images": len(source),
    "class_names": list(source.class_names),
    "crops": "ten" if args.ten_crop else f"random {args.random_crops}" if args.random_crops else 1,
    "flip": args.flip,
    "resize_ratio": args.resize_ratio,
    "seed": args.seed,
    "order": _ORDER,
    "shards": [{"file": f"tokens-{i:05}-of-{shards:05}.array_record"} for i in range(shards)],
  }
  if texts is not None:
    manifest["text"] = texts.fields()
  with contextlib.ExitStack() as stack:
    with outputs.locked(args.output, "--output", wait=_WAIT):
      if _claim(args.output, manifest):
        log.info("%s is complete", args.output)
        return
      stack.enter_context(outputs.present(args.output))
    _write(args, source, views, texts, manifest)


def _write(
  args: argparse.Namespace,
  source: sources.ImageSource,
  views: Views,
  texts: text_shards.Texts | None,
  manifest: dict,
) -> None:
  """Writes the shards that are not there, and the complete manifest."""
  shards = manifest["shards"]
  encode = _encoder(args.tokenizer, manifest["codebook_size"])
  order = rng.generator(args.seed, rng.Stream.TOKEN_ORDER).permutation(len(source))
  first = jax.process_index() * len(shards) // jax.process_count()
  bad = []

  def write(i: int) -> None:
    file = args.output / shards[i]["file"]
    counts = _kept(source, views, file, with_text=texts is not None)
    rows = order[i * len(source) // len(shards) : (i + 1) * len(source) // len(shards)]
    if counts is None:
      counts = _write_shard(args, source, rows, encode, views, texts, file, bar)
      log.info("%s: shard %d of %d", args.output, i + 1, len(shards))
    else:
      bar.update(len(rows))
    keys = ("images", "unreadable", *(("captions", "captions_cut") if texts else ()))
    shards[i] |= {key: counts[key] for key in keys}
    bad.extend(counts.get("unreadable_rows", []))

  tasks = [*range(first, len(shards)), *range(first)]
  with tqdm.tqdm(total=len(source), unit="image", disable=None) as bar:
    outputs.shared(args.output, tasks, write, "shards")
  manifest |= {"images": sum(s["images"] for s in shards), "unreadable": len(bad)}
  if pipeline.too_many_unreadable(len(bad), len(source), args.max_unreadable):
    names = ", ".join(source.name(row) for row in sorted(bad)[:3])
    raise UserError(
      f"{len(bad)} of {len(source)} images of {args.data} could not be read, more than"
      f" {100 * args.max_unreadable:g}%: {names}{', ...' if len(bad) > 3 else ''}; restore them and"
      f" run the same command again, remove them and {args.output}, or raise --max-unreadable"
    )
  with outputs.locked(args.output, "--output", wait=_WAIT):
    if texts is not None:
      texts.write_empty(args.output)
    _write_json(args.output / tokens.MANIFEST, manifest | {"complete": True})
    outputs.writers(args.output)
  log.info("%s: tokens of %d images", args.output, manifest["images"])
  if texts is not None:
    texts.log(args.output, shards)


def _claim(output: storage.Path, manifest: dict) -> bool:
  """Writes the manifest of a new directory; True if what is there is complete.

  A directory that lacks a shard is not complete, whatever its manifest says.

  Raises:
    UserError: the directory holds tokens of another tokenizer, of other settings or of other
      images, or part of what another version wrote.
  """
  file = output / tokens.MANIFEST
  if not file.exists():
    if any(not p.name.startswith(outputs.LOCK) for p in output.iterdir()):
      raise UserError(f"{output} is not empty and holds no tokens; empty it or take a new --output")
    _write_json(file, manifest)
    return False
  there = tokens.read_manifest(output)
  started = any((output / shard["file"]).is_file() for shard in there["shards"])
  if not started and not outputs.writers(output):
    _write_json(file, manifest)  # a first try that made nothing protects nothing
    return False
  for key, ours in manifest.items():
    theirs = there.get(key)
    if key == "shards":
      ours, theirs = len(ours), len(theirs or [])
    older = key == _SOURCE and key not in there
    if older or ours == theirs or key in ("complete", "order", "text"):
      continue
    if key == _SOURCE:
      raise UserError(
        f"{output} holds tokens of other images of {manifest['data']}:"
        f" {there.get('source_images')} then, {manifest['source_images']} now; restore the images,"
        f" or remove {output} or take a new --output"
      )
    raise UserError(
      f"{output} holds tokens with {key} {theirs!r}, not {ours!r}; remove it or take a new --output"
    )
  text_shards.check_same(output, there.get("text"), manifest.get("text"))
  files = [output / s["file"] for s in there["shards"]]
  if "text" in manifest:
    files += [_text_file(file) for file in files]
    files += [output / name for name in (manifest["text"].get("empty"),) if name]
  complete = there["complete"] and all(file.is_file() for file in files)
  if not complete and there.get("order") != manifest["order"]:
    raise UserError(
      f"{output} is unfinished, and the version that began it takes the images in another order; "
      "remove it or take a new --output"
    )
  return complete


def _write_json(file: storage.Path, value: dict) -> None:
  outputs.write_text(file, json.dumps(value, indent=1) + "\n")


def _text_file(shard: storage.Path) -> storage.Path:
  return shard.with_name(tokens.text_file(shard.name))


def _counts_file(shard: storage.Path) -> storage.Path:
  """How many images a shard holds, and the rows that it lacks; there before the shard is."""
  return shard.with_name(f"{shard.name}.json")


def _kept(
  source: sources.ImageSource, views: Views, shard: storage.Path, with_text: bool
) -> dict | None:
  """What `_counts_file` says of a shard that is there; None if the shard must be made.

  That is so if the shard lacks an image that can be read by now.
  """
  try:
    counts = json.loads(_counts_file(shard).read_text())
    rows = counts.get("unreadable_rows", [])
    whole = shard.is_file() and (not with_text or _text_file(shard).is_file())
    if not whole or len(rows) != counts["unreadable"]:  # older versions list no rows
      return None
  except (OSError, ValueError, KeyError, TypeError, AttributeError):  # missing or damaged
    return None
  for row in rows:
    found, _ = views.of(source, row)
    if not isinstance(found, str):
      return None
    log.warning(_LEFT_OUT, source.name(row), found)
  return counts


def _encoder(path: storage.Path, codebook_size: int) -> Callable[[np.ndarray], np.ndarray]:
  """Images uint8 [B, H, W, 3] to ids [B, N], on all devices if they divide B."""

  def ids(tokenizer, images):
    return tokenizer.encode_flat(pipeline.normalize(images))

  encode = arrays.jit_module(ids)(weights.load_tokenizer(path))

  def run(images):
    found, finite = encode(sharding.over_local_devices(images))
    if not finite:
      raise UserError(f"{path}: latents of the images are NaN or infinite, which are no tokens")
    return np.asarray(found).astype(tokens.id_type(codebook_size))

  return run


def _write_shard(
  args: argparse.Namespace,
  source: sources.ImageSource,
  rows: np.ndarray,
  encode: Callable[[np.ndarray], np.ndarray],
  views: Views,
  texts: text_shards.Texts | None,
  file: storage.Path,
  bar: tqdm.tqdm,
) -> dict:
  """Writes the shard of the images `rows` and their texts, and its counts, which it returns."""
  ids, labels, readable, unreadable = [], [], [], []
  size, n = views.image_size, args.batch_size
  with concurrent.futures.ThreadPoolExecutor() as pool:
    for start in range(0, len(rows), n):  # not all at once: decoded images are large
      part = [int(r) for r in rows[start : start + n]]
      crops = []
      found = pool.map(lambda row: views.of(source, row), part)
      for row, (images, label) in zip(part, found, strict=True):
        if isinstance(images, str):
          unreadable.append(row)
          log.warning(_LEFT_OUT, source.name(row), images)
          continue
        crops += images
        labels += [label] * len(images)
        readable.append(row)
      for first in range(0, len(crops), n):
        batch = crops[first : first + n]
        padded = np.zeros((n, size, size, 3), np.uint8)  # one shape compiles once
        padded[: len(batch)] = batch
        ids.append(encode(padded)[: len(batch)])
      bar.update(len(part))
  counts = {"images": len(labels), "unreadable": len(unreadable), "unreadable_rows": unreadable}
  numbers = np.asarray(labels, np.int32)
  file.unlink(missing_ok=True)  # a shard never stands beside another one's texts or counts
  if texts is not None:
    places, cut = texts.write(_text_file(file), readable)
    counts |= {"captions": int(places[:, 1].sum()), "captions_cut": cut}
    numbers = np.column_stack([numbers, places.repeat(len(views), 0)])
  _write_json(_counts_file(file), counts)
  mixed = rng.generator(args.seed, rng.Stream.TOKEN_MIX, int(rows[0])).permutation(len(labels))
  all_ids = np.concatenate(ids)[mixed] if ids else np.zeros((0, 0), np.uint16)
  numbers = numbers[mixed]
  parts = (slice(i, i + tokens.RECORD_IMAGES) for i in range(0, len(mixed), tokens.RECORD_IMAGES))
  records.write(file, (tokens.pack(all_ids[p], numbers[p]) for p in parts))
  return counts


def main(argv=None):
  cli.main(run, parser(), argv)


if __name__ == "__main__":
  main()
