"""CLIP's byte-pair tokenizer: texts to ids, as Hugging Face's `CLIPTokenizer` gives them.

A text is brought to NFC and to lower case. It is cut into words: contractions, runs of letters,
single numbers, runs of anything else. The bytes of a word, the last one with the mark `</w>`, are
merged pair by pair, the pair that comes first in the published list first. Unlike OpenAI's and
OpenCLIP's code, broken Unicode is not repaired and HTML entities stay as they are.
Source: `bpe_simple_vocab_16e6.txt` (Radford et al., arXiv 2103.00020).
"""

import functools
import gzip
import importlib.resources
import re
import unicodedata
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from coda_jax.errors import UserError

START, END = 49406, 49407
CONTEXT = 77
_SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}
_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# White_Space of Unicode; `str.isspace` has four control characters more.
_NO_SPACES = "\x1c\x1d\x1e\x1f"


@functools.cache
def _tables() -> tuple[dict[str, int], dict[tuple[str, str], int], list[str]]:
  """Ids of symbols, ranks of merges, and the character that stands for each byte."""
  shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
  order = shown + [b for b in range(256) if b not in shown]
  letters = {b: chr(b) if b in shown else chr(256 + i - len(shown)) for i, b in enumerate(order)}
  file = importlib.resources.files("coda_jax.text") / "clip_merges.txt.gz"
  lines = gzip.decompress(file.read_bytes()).decode().split("\n")
  merges = [(a, b) for a, _, b in (line.partition(" ") for line in lines if line)]
  symbols = [letters[b] for b in order]
  symbols += [s + "</w>" for s in symbols] + [a + b for a, b in merges]
  ids = {symbol: i for i, symbol in enumerate(symbols)}
  return ids, {pair: i for i, pair in enumerate(merges)}, [letters[b] for b in range(256)]


def _kind(c: str) -> str:
  """A letter, a number, a space or anything else."""
  category = unicodedata.category(c)[0]
  if category in "LN":
    return category
  return " " if c.isspace() and c not in _NO_SPACES else "other"


def _words(text: str) -> list[str]:
  """The words of a text in lower case."""
  words, i = [], 0
  kinds = [_kind(c) for c in text]
  while i < len(text):
    start, kind = i, kinds[i]
    found = next((c for c in _CONTRACTIONS if text.startswith(c, i)), None)
    if found:
      i += len(found)
    elif kind == "N":
      i += 1
    else:
      while i < len(text) and kinds[i] == kind:
        i += 1
    if kind != " ":
      words.append(text[start:i])
  return words


@functools.lru_cache(2**16)
def _ids_of(word: str) -> tuple[int, ...]:
  """Ids of a word: its bytes, merged."""
  ids, ranks, letters = _tables()
  parts = [letters[b] for b in word.encode("utf-8", "replace")]
  parts[-1] += "</w>"
  while len(parts) > 1:
    pairs = list(zip(parts, parts[1:], strict=False))
    best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
    if best not in ranks:
      break
    merged, i = [], 0
    while i < len(parts):
      whole = tuple(parts[i : i + 2]) == best
      merged.append("".join(best) if whole else parts[i])
      i += 2 if whole else 1
    parts = merged
  return tuple(ids[p] for p in parts)


def tokens(text: str) -> list[int]:
  """All ids of a text, without those of its start and end."""
  ids = []
  for part in re.split(f"({'|'.join(map(re.escape, _SPECIAL))})", text):
    if part in _SPECIAL:
      ids.append(_SPECIAL[part])
    else:
      ids += [i for word in _words(_normal(part)) for i in _ids_of(word)]
  return ids


def _normal(text: str) -> str:
  # Letter by letter: `str.lower` of a whole text writes a Greek sigma at its end differently.
  return "".join(c.lower() for c in unicodedata.normalize("NFC", text))


def encode(
  texts: Sequence, *, context: int = CONTEXT, padding: int = END
) -> tuple[Int[np.ndarray, "b {context}"], list[int]]:
  """Rows of ids: the start token, the text, the end token, padding.

  Args:
    texts: of any length; what does not fit is cut off.
    context: ids of a row.
    padding: the end token, as Hugging Face's tokenizer has it; 0 is that of OpenAI's code.

  Returns:
    (ids, the numbers of the texts that were cut).

  Raises:
    UserError: something is no text.
  """
  rows, cut = np.full((len(texts), context), padding, np.int32), []
  for n, text in enumerate(texts):
    if not isinstance(text, str):
      raise UserError(f"text {n + 1} is a {type(text).__name__}; give texts, such as 'a red bird'")
    found = tokens(text)
    if len(found) > context - 2:
      found = found[: context - 2]
      cut.append(n)
    row = [START, *found, END]
    rows[n, : len(row)] = row
  return rows, cut
