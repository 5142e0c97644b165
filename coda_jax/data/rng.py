"""Random numbers on the host: pure functions of (seed, stream, keys), equal on every machine.

A stream is one purpose, so that two purposes never draw the same numbers. A stream's number is part
of the meaning of a seed: it never changes, because a run must continue in the same order after an
upgrade, and a number that is given up is not used again.
"""

import enum

import numpy as np


class Stream(enum.IntEnum):
  """What the numbers are drawn for, and the keys that follow it."""

  EPOCH = 0  # order of an epoch's images, or of its token records: epoch
  CROP = 1  # place and mirroring of a training crop: global index
  WINDOW = 1  # order of the images in a window of token records: epoch, window. No run reads both
  REPLACEMENT = 2  # row instead of an unreadable one: global index, attempt
  TOKEN_CROP = 3  # place of a crop that is tokenized: row, view
  SAMPLES = 4  # ids of the baselines that samples are compared with
  TOKEN_ORDER = 5  # which images a shard of tokens holds
  TOKEN_MIX = 6  # order of the crops in a shard of tokens: first row
  KERNEL_SUBSET = 7  # which images a subset of a kernel distance holds: number of the subset
  CAPTION = 8  # which of an image's captions stands in a batch: global index


def words(seed: int, stream: Stream, *keys: int) -> list[int]:
  """Four random 64-bit integers. Cheaper than a generator where a few numbers suffice."""
  sequence = np.random.SeedSequence((seed, stream, *keys))
  return [int(w) for w in sequence.generate_state(4, np.uint64)]


def generator(seed: int, stream: Stream, *keys: int) -> np.random.Generator:
  """A generator that starts at the same place for the same arguments."""
  return np.random.default_rng((seed, stream, *keys))
