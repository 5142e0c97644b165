"""The classes of a command line."""

import pytest

from coda_jax import cli
from coda_jax.generation import options


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("3,dog,null", [3, "dog", None]),
    (' 3 , dog ,"null"', [3, "dog", "null"]),
    ('"7","a, b","say ""hi"""', ["7", "a, b", 'say "hi"']),
    ("-1,great white", [-1, "great white"]),
  ],
)
def test_any_class_name_can_be_written(text, words):
  assert options.class_words(text) == words


@pytest.mark.parametrize("text", ["", ",", "3,", ',3"', '"a', 'a"b"', '"a"b', '""'])
def test_classes_that_cannot_be_read(text):
  with pytest.raises(cli.UsageError, match="quotes around names"):
    options.class_words(text)


def test_numbers():
  assert options.numbers("--sweep-steps", "1,8") == [1, 8]
  assert options.numbers("--sweep-guidance", "0,1.5", float) == [0.0, 1.5]
  assert options.numbers("--sweep-steps", None) == []
  with pytest.raises(cli.UsageError, match="--sweep-steps 1,a: write whole numbers"):
    options.numbers("--sweep-steps", "1,a")
