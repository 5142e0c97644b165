"""Options of commands that sample from a generator: classes and the sampler's settings."""

import argparse
import dataclasses
import re

from coda_jax import cli
from coda_jax.errors import UserError
from coda_jax.generation import masking, sampler
from coda_jax.generation.generator import Generator
from coda_jax.generation.sampler import SamplerSettings


def add_classes(p) -> None:
  """Adds `--classes` and `--count`."""
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


def parse_classes(text: str, generator: Generator) -> list[int | None]:
  """The classes of `--classes`. Raises UserError for one that the generator does not have."""
  if text == "all":
    return list(range(generator.config.num_classes)) or [None]
  words = class_words(text)
  unknown = [w for w in words if isinstance(w, str) and w not in generator.class_names]
  if unknown:
    raise UserError(generator.unknown_class(unknown[0]))
  ids = generator.class_ids(words)
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
