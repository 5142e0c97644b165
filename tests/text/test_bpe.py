"""CLIP's tokenizer, against ids of Hugging Face's `CLIPTokenizer` (transformers 5.24)."""

import gzip
import json
import pathlib

import numpy as np
import pytest

from coda_jax.errors import UserError
from coda_jax.text import bpe

DATA = pathlib.Path(__file__).parent / "data" / "clip_tokens.json.gz"


def check(cases):
  rows, _ = bpe.encode([c["text"] for c in cases])
  assert rows.shape == (len(cases), 77) and rows.dtype == np.int32
  for row, case in zip(rows, cases, strict=True):
    count = len(case["ids"])
    assert row[:count].tolist() == case["ids"], ascii(case["text"])
    assert (row[count:] == bpe.END).all() or "<|" in case["text"]


@pytest.mark.parity("clip_tokens")
def test_ids_of_the_official_tokenizer(golden):
  check(json.loads((golden.folder / f"{golden.name}.json").read_text()))


def test_ids_of_two_thousand_texts():
  """Texts in two dozen scripts, with emoji, control characters, long and empty ones."""
  cases = json.loads(gzip.decompress(DATA.read_bytes()))
  assert len(cases) == 2000
  check(cases)


def test_long_texts_are_cut_and_named():
  rows, cut = bpe.encode(["a " * 75, "b", "a " * 76])
  assert cut == [2] and (rows[[0, 2], -1] == bpe.END).all()
  np.testing.assert_array_equal(rows[0], rows[2])
  short, cut = bpe.encode(["a cat"], context=3, padding=0)
  assert short.tolist() == [[bpe.START, 320, bpe.END]] and cut == [0]
  assert bpe.encode(["a"], padding=0)[0][0, :5].tolist() == [bpe.START, 320, bpe.END, 0, 0]


def test_what_is_no_text_is_named():
  with pytest.raises(UserError, match="text 2 is a int; give texts"):
    bpe.encode(["a", 3])
