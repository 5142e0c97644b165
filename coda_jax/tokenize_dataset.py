"""`python -m coda_jax.tokenize_dataset`: the tokens of an image set, to train a generator on.

The same command continues a run that was stopped or killed: shards are written aside and renamed,
and those that are there are kept.
"""

import argparse
import concurrent.futures
import json
import logging
import pathlib

import jax
import numpy as np
from flax import nnx

from coda_jax import cli, weights
from coda_jax.data import decode, pipeline, sources, tokens
from coda_jax.errors import UserError

log = logging.getLogger("coda_jax")


def parser() -> argparse.ArgumentParser:
  p = argparse.ArgumentParser(
    prog="python -m coda_jax.tokenize_dataset", description="Writes the tokens of an image set."
  )
  p.add_argument("--tokenizer", required=True, metavar="DIR")
  p.add_argument("--data", required=True, metavar="SPEC", help="for example folder:PATH@train")
  p.add_argument("--output", required=True, metavar="DIR", type=pathlib.Path)
  p.add_argument("--flip", action="store_true", help="every crop mirrored too")
  crops = p.add_mutually_exclusive_group()
  crops.add_argument(
    "--ten-crop", action="store_true", help="corners and centre, each mirrored too"
  )
  crops.add_argument("--random-crops", type=int, default=0, metavar="K", help="K random crops each")
  p.add_argument("--resize-ratio", type=float, default=1.125, help="shorter edge / crop")
  p.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time")
  p.add_argument("--shards", type=int, default=0, metavar="N", help="files; 0: of 10,000 images")
  p.add_argument("--seed", type=int, default=0, help="of the images' order and random crops")
  return p


def run(args: argparse.Namespace) -> None:
  """Writes what is missing of the tokens; see the module's docstring."""
  if args.batch_size < 1 or args.shards < 0 or args.random_crops < 0 or args.resize_ratio < 1:
    raise cli.UsageError("--batch-size, --shards, --random-crops or --resize-ratio is too small")
  source = sources.open_source(args.data)
  fields = weights.read_config(args.tokenizer, "tokenizer")
  views = _views(args)
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
    "source_images": len(source),
    "class_names": list(source.class_names),
    "crops": "ten" if args.ten_crop else f"random {args.random_crops}" if args.random_crops else 1,
    "flip": args.flip,
    "resize_ratio": args.resize_ratio,
    "seed": args.seed,
    "shards": [{"file": f"tokens-{i:05}-of-{shards:05}.array_record"} for i in range(shards)],
  }
  if _claim(args.output, manifest):
    log.info("%s is complete", args.output)
    return
  encode = _encoder(args.tokenizer, fields)
  order = np.random.default_rng((args.seed, 2)).permutation(len(source))
  for i, shard in enumerate(manifest["shards"]):
    counts = args.output / f"{shard['file']}.json"  # written before the shard takes its name
    if not (args.output / shard["file"]).is_file():
      rows = order[i * len(source) // shards : (i + 1) * len(source) // shards]
      _write_shard(args, source, views, rows, encode, manifest, args.output / shard["file"], counts)
      log.info("%s: shard %d of %d", args.output, i + 1, shards)
    shard |= json.loads(counts.read_text())
  manifest["images"] = sum(s["images"] for s in manifest["shards"])
  manifest["unreadable"] = sum(s["unreadable"] for s in manifest["shards"])
  if manifest["unreadable"] > pipeline.MAX_UNREADABLE * len(source):
    raise UserError(
      f"{manifest['unreadable']} of {len(source)} images of {args.data} could not be read, more "
      f"than {pipeline.MAX_UNREADABLE:.0%}"
    )
  _write_json(args.output / tokens.MANIFEST, manifest | {"complete": True})
  log.info("%s: tokens of %d images", args.output, manifest["images"])


def _views(args) -> list[tuple]:
  """(position or None for a random one, mirrored) of every crop; positions are corners or -1."""
  corners = [("top", "left"), ("top", "right"), ("bottom", "left"), ("bottom", "right"), "centre"]
  if args.ten_crop:
    return [(c, flip) for c in corners for flip in (False, True)]
  crops = ["random"] * args.random_crops or ["centre"]
  return [(c, flip) for c in crops for flip in ((False, True) if args.flip else (False,))]


def _claim(output: pathlib.Path, manifest: dict) -> bool:
  """Writes the manifest of a new directory; True if what is there is complete.

  Raises:
    UserError: the directory holds tokens of another tokenizer or of other settings.
  """
  file = output / tokens.MANIFEST
  if not file.exists():
    try:
      output.mkdir(parents=True, exist_ok=True)
      if any(output.iterdir()):
        raise UserError(f"{output} is not empty and holds no tokens; take a new --output")
      _write_json(file, manifest)
    except OSError as e:
      raise UserError(f"--output={output} cannot be written: {e.strerror}") from e
    return False
  there = tokens.read_manifest(output)
  for key, ours in manifest.items():
    theirs = there.get(key)
    if key == "shards":
      ours, theirs = len(ours), len(theirs)
    if key != "complete" and ours != theirs:
      raise UserError(
        f"{output} holds tokens with {key} {theirs!r}, not {ours!r}; take a new --output"
      )
  return there["complete"]


def _write_json(file: pathlib.Path, value) -> None:
  aside = file.with_name(file.name + ".partial")
  aside.write_text(json.dumps(value, indent=1) + "\n")
  aside.rename(file)


def _encoder(path: str, fields: dict):
  """Images uint8 [B, H, W, 3] to ids [B, N], on all devices if they divide B."""
  graphdef, state = nnx.split(weights.load_tokenizer(path))
  kind = tokens.id_type(fields["quantizer"]["codebook_size"])
  mesh = jax.sharding.Mesh(np.asarray(jax.local_devices()), ("data",))
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

  @jax.jit
  def encode(state, images):
    ids = nnx.merge(graphdef, state).encode(pipeline.normalize(images))
    return jax.numpy.concatenate([i.reshape(len(images), -1) for i in ids], 1)

  def run(images):
    even = len(images) % mesh.size == 0
    images = jax.device_put(images, split if even else None)
    return np.asarray(encode(state, images)).astype(kind)

  return run


def _crops(args, source, views, image_size: int, row: int):
  """(crops [views, H, W, 3] or the reason why there are none, label)."""
  try:
    data, label = source[row]
    image = decode.decode_image(data)
    crops = []
    for i, (where, flip) in enumerate(views):
      position = None
      if where == "random":  # a mirrored crop is that of its own random numbers
        position = tuple(pipeline._random_words(args.seed, 3, row, i)[:2])
      elif where != "centre":
        side = max(image_size, round(args.resize_ratio * image_size))
        w, h = decode._resized(image.size, side)
        position = (
          0 if where[0] == "top" else h - image_size,
          0 if where[1] == "left" else w - image_size,
        )
      crops.append(
        decode.resize_and_crop(
          image, image_size, resize_ratio=args.resize_ratio, position=position, flip=flip
        )
      )
    return np.stack(crops), label
  except (decode.UnreadableImage, OSError) as e:
    return str(e), -1


def _write_shard(args, source, views, rows, encode, manifest, file, counts) -> None:
  """Writes the shard of the images `rows`, and how many they were."""
  writer_type, _ = tokens._import_array_record()
  ids, labels, waiting, unreadable = [], [], [], 0
  size, n = manifest["image_size"], args.batch_size

  def flush(last: bool) -> None:
    nonlocal waiting
    images = np.concatenate(waiting) if waiting else np.zeros((0, size, size, 3), np.uint8)
    while len(images) >= n or (last and len(images)):
      batch, images = images[:n], images[n:]
      padded = np.zeros((n, size, size, 3), np.uint8)  # one shape compiles once
      padded[: len(batch)] = batch
      ids.append(encode(padded)[: len(batch)])
    waiting = [images] if len(images) else []

  with concurrent.futures.ThreadPoolExecutor() as pool:
    for start in range(0, len(rows), n):  # not all at once: decoded images are large
      part = [int(r) for r in rows[start : start + n]]
      found = pool.map(lambda r: _crops(args, source, views, size, r), part)
      for row, (crops, label) in zip(part, found, strict=True):
        if isinstance(crops, str):
          unreadable += 1
          log.warning("unreadable image %s (%s): left out", source.name(row), crops)
          continue
        waiting.append(crops)
        labels += [label] * len(views)
        if sum(map(len, waiting)) >= n:
          flush(last=False)
  flush(last=True)
  labels = np.asarray(labels, np.int32)
  if ids:
    mixed = np.random.default_rng((args.seed, 4, int(rows[0]))).permutation(len(labels))
    ids, labels = np.concatenate(ids)[mixed], labels[mixed]
  aside = file.with_name(file.name + ".partial")
  writer = writer_type(str(aside), "group_size:1")
  for start in range(0, len(labels), tokens.RECORD_IMAGES):
    part = slice(start, start + tokens.RECORD_IMAGES)
    writer.write(tokens.pack(ids[part], labels[part]))
  writer.close()
  _write_json(counts, {"images": len(labels), "unreadable": unreadable})
  aside.rename(file)


def main(argv=None):
  cli.main(run, parser(), argv)


if __name__ == "__main__":
  main()
