"""Options of commands that sample from a generator: classes or prompts, and the sampler's."""

import argparse
import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from typing import Any

from coda_jax import cli, storage
from coda_jax.errors import UserError
from coda_jax.generation import masking, sampler
from coda_jax.generation.conditions import Classes, Wanted
from coda_jax.generation.generator import Generator
from coda_jax.generation.sampler import SamplerSettings


def add_wanted(p) -> None:
  """Adds `--classes`, the options of prompts, and `--count`."""
  p.add_argument(
    "--classes",
    metavar="A,B",
    help='numbers or names, quoted where they hold commas or look like numbers: 0,cat,"a, b"; '
    "null is none of them (default: all)",
  )
  p.add_argument(
    "--prompt",
    action="append",
    metavar="TEXT",
    help="of a generator of texts; repeatable",
  )
  p.add_argument("--prompts", metavar="FILE", type=cli.path, help="a prompt a line")
  p.add_argument(
    "--negative-prompt", metavar="TEXT", help="what guidance leads away from (the empty text)"
  )
  p.add_argument(
    "--text-encoder", metavar="DIR", type=cli.path, help="of a generator that does not hold its own"
  )
  p.add_argument(
    "--count",
    type=cli.integer(1, 10**7),
    metavar="N",
    help="images of each class or prompt (4; of --prompts 1)",
  )


def add_sampling(p) -> None:
  """Adds the settings of `SamplerSettings` as a group."""
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


def settings_of(args: argparse.Namespace) -> SamplerSettings:
  """The settings given; the order is `SamplerSettings`' where none is."""
  given = {f.name: getattr(args, f.name) for f in dataclasses.fields(SamplerSettings)}
  return SamplerSettings(**{k: v for k, v in given.items() if v is not None})


def check_wanted(args: argparse.Namespace) -> None:
  """Raises UsageError for options of classes and of prompts at once; sets the default `--count`."""
  if sum(x is not None for x in (args.classes, args.prompt, args.prompts)) > 1:
    raise cli.UsageError("--classes, --prompt and --prompts: one of the three says what to make")
  if args.count is None:
    args.count = 1 if args.prompts else 4


def wanted_of(args: argparse.Namespace, generator: Generator) -> list[int | str | None]:
  """The classes or prompts that the options ask for, each once.

  Raises:
    UserError: the generator has the other of the two, or no such class, or the file of prompts
      cannot be read.
  """
  texts = args.prompt or args.prompts or args.negative_prompt is not None
  if isinstance(generator.conditions, Classes):
    if texts:
      raise UserError("the generator was trained on classes, not on texts: --classes says which")
    args.classes = "all" if args.classes is None else args.classes
    return list(parse_classes(args.classes, generator.conditions, generator.config.num_classes))
  if args.classes is not None:
    raise UserError(
      "the generator was trained on texts, not on classes: --prompt TEXT or --prompts FILE"
    )
  if args.negative_prompt is not None and not args.guidance:
    raise UserError("--negative-prompt does nothing with --guidance 0: set it above 0")
  if args.prompts:
    return list(read_prompts(args.prompts))
  if not args.prompt:
    raise UserError("the generator was trained on texts: --prompt TEXT or --prompts FILE")
  return list(args.prompt)


def read_prompts(path: storage.Path) -> list[str]:
  """The lines of a file that are not empty. Raises UserError if it cannot be read or has none."""
  try:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
  except UnicodeDecodeError as e:
    raise UserError(f"{path} is no UTF-8 text: {e}") from e
  prompts = [line for line in lines if line]
  if not prompts:
    raise UserError(f"{path} holds no prompts; write one a line")
  return prompts


def asked_for(generator: Generator, wanted: Wanted, negative: str | None = None) -> dict[str, Any]:
  """The arguments of `Generator.generate` that name what is wanted."""
  away = {} if negative is None else {"negative_prompts": negative}
  return {generator.conditions.keyword: wanted, **away}


def described(
  args: argparse.Namespace, generator: Generator, wanted: Sequence[int | str | None]
) -> dict[str, Any]:
  """What records say of what was asked for."""
  if isinstance(generator.conditions, Classes):
    return {"classes": args.classes}
  return {
    "prompts": os.fspath(args.prompts) if args.prompts else list(wanted),
    "prompts_sha256": hashlib.sha256("\n".join(map(str, wanted)).encode()).hexdigest(),
    "negative_prompt": args.negative_prompt,
  }


def parse_classes(text: str, classes: Classes, count: int) -> list[int | None]:
  """The classes of `--classes`. Raises UserError for one that the generator does not have."""
  if text == "all":
    return list(range(count)) or [None]
  words = class_words(text)
  unknown = [w for w in words if isinstance(w, str) and not classes.has(w)]
  if unknown:
    raise UserError(classes.unknown(unknown[0]))
  ids = classes(words)
  return [None if word is None else int(c) for word, c in zip(words, ids, strict=True)]


def class_words(text: str) -> list[int | str | None]:
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


def numbers(option: str, text: str | None, kind: type = int) -> list:
  """Numbers with commas between, whole ones or, with `kind=float`, any."""
  try:
    return [kind(word) for word in text.split(",")] if text else []
  except ValueError:
    what = "whole numbers" if kind is int else "numbers"
    raise cli.UsageError(f"{option} {text}: write {what} with commas between") from None
