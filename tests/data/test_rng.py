"""Random numbers of the host are pure functions, and a stream's number never changes."""

import numpy as np

from coda_jax.data import rng
from coda_jax.data.rng import Stream


def test_the_numbers_are_those_of_the_first_release():
  assert rng.words(1, Stream.REPLACEMENT, 3)[0] == 12997252459554536576
  assert Stream.__members__ == {
    "EPOCH": 0,
    "CROP": 1,
    "WINDOW": 1,
    "REPLACEMENT": 2,
    "TOKEN_CROP": 3,
    "SAMPLES": 4,
    "TOKEN_ORDER": 5,
    "TOKEN_MIX": 6,
    "KERNEL_SUBSET": 7,
    "CAPTION": 8,
  }
  expected = np.random.default_rng((7, 4)).integers(0, 1000, 5)
  np.testing.assert_array_equal(rng.generator(7, Stream.SAMPLES).integers(0, 1000, 5), expected)


def test_seeds_streams_and_keys_give_unrelated_numbers():
  words = [
    tuple(rng.words(seed, stream, *keys))
    for seed in range(3)
    for stream in Stream
    for keys in ((1,), (2,), (1, 1))
  ]
  assert len(set(words)) == 3 * 9 * 3
  assert all(0 <= w < 2**64 for four in words for w in four)
