"""The texts of a directory of tokens: captions, or their embeddings, a file for every shard.

See `data.tokens` for how they are read.
"""

import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from coda_jax import outputs, storage
from coda_jax.data import records
from coda_jax.data.text import Captions, open_captions
from coda_jax.errors import UserError
from coda_jax.text import TextEncoder, load_text_encoder

log = logging.getLogger("coda_jax")

_EMPTY = "empty.npy"  # the embedding of the empty caption
_CAPTIONS = "captions_fingerprint"


class Texts:
  """Writes the texts of images.

  Args:
    captions: of every image.
    encoder: makes the embeddings that are written; None to write the captions themselves.
    batch_size: captions that are embedded at a time.
  """

  def __init__(self, captions: Captions, encoder: TextEncoder | None, batch_size: int):
    self._captions, self._encoder, self._batch_size = captions, encoder, batch_size

  def fields(self) -> dict[str, Any]:
    """What the manifest says of them: its key `text`."""
    fields: dict[str, Any] = {_CAPTIONS: self._captions.fingerprint()}
    if (encoder := self._encoder) is None:
      return {"kind": "captions"} | fields
    return {
      "kind": "embeddings",
      "encoder": {"kind": encoder.kind, "fingerprint": encoder.fingerprint},
      "tokens": encoder.tokens,
      "width": encoder.width,
      "padding": encoder.padding,
      "empty": _EMPTY,
    } | fields

  def write_empty(self, folder: storage.Path) -> None:
    """Writes the embedding of the empty caption, if there are embeddings."""
    if self._encoder is None:
      return
    buffer = io.BytesIO()
    (embedding,) = self._embeddings([""], [])
    np.save(buffer, np.frombuffer(embedding, "<f2").reshape(self._encoder.tokens, -1))
    with outputs.replaced(folder / _EMPTY) as aside:
      aside.write_bytes(buffer.getvalue())

  def write(self, file: storage.Path, rows: Sequence[int]) -> tuple[np.ndarray, int]:
    """Writes the texts of images.

    Returns:
      (int32 [k, 2], the first record and the number of captions of each of the k images; how many
      captions were longer than the encoder's tokens and are cut)
    """
    counts = [self._captions.count(row) for row in rows]
    texts = (text for row in rows for text in self._captions[row])
    cut: list[int] = []
    if self._encoder is None:
      records.write(file, (text.encode() for text in texts))
    else:
      records.write(file, self._embeddings(texts, cut), compressed=False)
    firsts = np.cumsum([0, *counts])[:-1]
    return np.stack([firsts, counts], 1).astype(np.int32).reshape(-1, 2), len(cut)

  def log(self, folder: storage.Path, shards: Sequence[Mapping[str, Any]]) -> None:
    """Says how many captions the shards of a manifest hold, and how many of them were cut."""
    captions, cut = (sum(s[key] for s in shards) for key in ("captions", "captions_cut"))
    log.info("%s: %d captions", folder, captions)
    if cut and self._encoder:
      most = self._encoder.tokens
      log.warning("%s: %d captions are longer than %d tokens and are cut", folder, cut, most)

  def _embeddings(self, texts: Iterable[str], cut: list[int]) -> Iterator[bytes]:
    """float16 embeddings one by one; adds the texts that are cut to `cut`."""
    encoder = self._encoder
    assert encoder is not None
    texts, n = iter(texts), self._batch_size
    while batch := [text for _, text in zip(range(n), texts, strict=False)]:
      ids, long = encoder.tokenize(batch)
      cut += long
      padded = np.pad(ids, ((0, n - len(ids)), (0, 0)), mode="edge")  # one shape compiles once
      found = encoder.embed(padded)[: len(ids)].astype("<f2")
      if not np.isfinite(found).all():
        raise UserError(f"the text encoder gives NaN or infinite numbers, as for {batch[0]!r}")
      yield from (embedding.tobytes() for embedding in found)


def open_texts(
  source: Any,
  spec: str,
  kind: str | None,
  encoder: storage.Path | None,
  file: storage.Path | None,
  batch_size: int,
) -> Texts | None:
  """What writes the texts of the images of `source`, which `spec` opened; None for no `kind`.

  Args:
    kind: "captions", "embeddings" or None.
    encoder: directory of a text encoder, for embeddings.
    file: as for `data.text.open_captions`.
    batch_size: as for `Texts`.

  Raises:
    UserError: the arguments contradict one another, no such encoder, or no captions.
  """
  if kind is None and (encoder or file):
    raise UserError("--captions and --text-encoder go with --text captions or --text embeddings")
  if (kind == "embeddings") != (encoder is not None):
    raise UserError("--text embeddings needs --text-encoder DIR, and --text captions takes none")
  if kind is None:
    return None
  captions = open_captions(source, spec, file)
  return Texts(captions, load_text_encoder(encoder) if encoder else None, batch_size)


def check_same(output: storage.Path, there: dict | None, ours: dict | None) -> None:
  """Checks that the texts of a directory are those that would be written.

  Args:
    there, ours: the manifest's `text`; None for no texts.

  Raises:
    UserError: they are others.
  """
  if there == ours:
    return
  what = {key: (there or {}).get(key, "no") for key in ("kind", "encoder", _CAPTIONS)}
  mine = {key: (ours or {}).get(key, "no") for key in what}
  if what["kind"] != mine["kind"]:
    difference = f"tokens with {what['kind']} texts, not {mine['kind']}"
  elif what["encoder"] != mine["encoder"]:
    difference = f"embeddings of another text encoder ({_named(what)}, not {_named(mine)})"
  else:
    difference = "other captions of the images"
  raise UserError(f"{output} holds {difference}; remove it or take a new --output")


def _named(fields: dict) -> str:
  return f"{fields['encoder']['kind']} {fields['encoder']['fingerprint'][:12]}"
