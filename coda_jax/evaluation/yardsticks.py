"""What samples are to be compared with: sets from the best to the worst that is to be expected.

Other real crops; those brought through the tokenizer, what its decoder leaves of a perfect
generator; tokens drawn from the real crops' marginals, one position independent of the other; and
random tokens.
"""

import argparse
import functools
from typing import Any

import numpy as np

from coda_jax.data import rng
from coda_jax.data.pipeline import normalize
from coda_jax.evaluation import entries
from coda_jax.evaluation.conventions import Convention
from coda_jax.evaluation.features import Networks
from coda_jax.evaluation.image_sets import RealImages, Reconstructions, Samples
from coda_jax.evaluation.readers import SpecImages
from coda_jax.evaluation.record import Side
from coda_jax.generation.generator import Generator
from coda_jax.generation.sampler import SamplerSettings


def yardsticks(
  args: argparse.Namespace,
  generator: Generator,
  count: int,
  networks: Networks,
  convention: Convention,
) -> list[Any]:
  """Four sets of `count` images; crops are random ones of the training's kind, half mirrored.

  Marginals are those of the first 4,096 crops.
  """
  reader = SpecImages(
    args.data,
    generator.image_size,
    args.resize_ratio,
    crop="random",
    seed=args.seed,
    stream=count,
  )
  size = min(args.batch_size, count)
  how = networks, convention, size
  path = args.generator / "tokenizer"
  name = "other real crops, reconstructed"
  entry = entries.open_entry(name, path, generator.image_size)
  crops = RealImages("other real crops", reader, *how)
  made = Reconstructions(entry, reader, *how)
  tokens, codes = generator.config.tokens, generator.config.codebook_size
  of_position = np.arange(tokens)

  @functools.cache
  def ids() -> np.ndarray:
    known = min(count, 4096)
    parts = []
    for first in range(0, known, size):
      rows = [min(i, known - 1) for i in range(first, first + size)]
      images, _, _ = reader.load(rows)
      parts.append(np.asarray(generator.encode(normalize(images)))[: known - first])
    return np.concatenate(parts)

  def draw(number: int, most: int) -> np.ndarray:
    return rng.generator(args.seed, rng.Stream.SAMPLES, number).integers(0, most, tokens)

  def marginal(numbers, settings):
    return generator.decode(
      np.stack([ids()[draw(i, len(ids())), of_position] for i in numbers]).astype(np.int32)
    )

  def uniform(numbers, settings):
    return generator.decode(np.stack([draw(i, codes) for i in numbers]).astype(np.int32))

  out: list[Any] = [crops, made]
  for what, make in (("tokens from marginals", marginal), ("random tokens", uniform)):
    identity = {"yardstick": what, "seed": args.seed, **entry.identity, **reader.identity}
    out.append(Samples(what, count, make, SamplerSettings(), *how, identity))
  for s in out:
    s.side = reader.side if s in (crops, made) else Side(s.name, count)
  return out
